"""Evaluation: benchmarks put to models, alone, by several processes, and while training."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from transformers import GPT2Config, GPT2LMHeadModel

from fgpt_hf.cli.main import run
from fgpt_hf.errors import UserError
from fgpt_hf.evaluation.benchmark import Benchmark, load_benchmarks
from fgpt_hf.evaluation.checks import Benchmarks
from tests.support.forked import run_command
from tests.support.tiny import CONTEXT, random_model, save, tokenizer

REPOSITORY = Path(__file__).parents[2]
ENDINGS = ["on the mat", "under the table", "in the kitchen of the house", "nowhere"]


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Choices whose contexts have lengths of all kinds, two of them beyond what the models read."""
    file = tmp_path / "questions.jsonl"
    contexts = [f"f{number}(x)\nThe cat{' and the dog' * (number % 9)} sat" for number in range(24)]
    contexts += ["word " * 200 + "end"] * 2
    rows = [{"context": text, "endings": ENDINGS, "label": number % 4} for number, text in enumerate(contexts)]
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return file


def test_a_result_counts_its_examples_and_what_was_cut(questions: Path) -> None:
    result = Benchmark(f"pydocs-choice={questions}", tokenizer()).run(Accelerator(cpu=True), random_model())
    assert (result.examples, result.contexts_cut, result.headline_metric) == (26, 8, "acc_norm")
    metrics = {"acc", "acc_norm", "acc_bytes", "acc_token"}
    assert set(result.metrics) == metrics | {f"{metric}_stderr" for metric in metrics}


def test_a_check_logs_each_measure_under_its_task(questions: Path) -> None:
    benchmark = Benchmark(f"pydocs-choice={questions}", tokenizer(), limit=4)
    recorded: list[Any] = []
    logged = Benchmarks(1, Accelerator(cpu=True), random_model(), [benchmark], recorded.extend)(0)
    assert [(result.task, result.examples) for result in recorded] == [(benchmark.name, 4)]
    assert logged == {
        f"pydocs-choice/{name}": value
        for name, value in benchmark.run(Accelerator(cpu=True), random_model()).metrics.items()
    }


def test_benchmarks_that_could_not_be_told_apart_or_have_no_file_are_refused(questions: Path) -> None:
    two = [f"pydocs-choice={questions}", "pydocs-choice"]
    with pytest.raises(ValueError, match="eval_tasks names pydocs-choice twice"):
        load_benchmarks(two, tokenizer(), CONTEXT)
    with pytest.raises(ValueError, match="pydocs-validation= names no file"):
        Benchmark("pydocs-validation=", tokenizer())


def test_an_unknown_benchmark_is_refused_before_another_one_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fgpt_hf.evaluation.benchmark.load_examples", lambda *given: pytest.fail("loaded"))
    with pytest.raises(ValueError, match="unknown task 'hellaswagg'"):
        load_benchmarks(["piqa", "hellaswagg"], tokenizer(), CONTEXT)


@pytest.mark.slow
def test_an_example_longer_than_the_context_is_refused_when_it_is_loaded(questions: Path) -> None:
    """As running the benchmark would refuse it, at its first example of that kind."""
    name = f"pydocs-choice={questions}"
    for context in range(1, 30):
        model = random_model(max_position_embeddings=context)
        try:
            Benchmark(name, tokenizer()).run(Accelerator(cpu=True), model)
        except UserError as error:
            with pytest.raises(UserError) as refused:
                load_benchmarks([name], tokenizer(), context)
            assert str(refused.value) == str(error)
        else:
            load_benchmarks([name], tokenizer(), context)


def evaluate(folder: Path, *arguments: object, processes: int = 1) -> subprocess.CompletedProcess[str]:
    """Run `fgpt evaluate …` in processes of its own."""
    return run_command("fgpt", "evaluate", *arguments, cwd=folder, processes=processes)


def results(file: Path) -> tuple[dict[str, Any], list[tuple[int, int]]]:
    """What does not depend on the time that it took."""
    content = json.loads(file.read_text(encoding="utf-8"))
    return content["tasks"], [(run["examples"], run["contexts_cut"]) for run in content["runs"].values()]


@pytest.mark.slow
def test_two_processes_give_the_results_of_one(questions: Path, tmp_path: Path) -> None:
    save(random_model(), tmp_path / "model")
    (tmp_path / "book.txt").write_text("The cat sat on the mat, and the dog under the table. " * 30, encoding="utf-8")
    tasks = ("--tasks", "pydocs-choice=questions.jsonl,pydocs-validation=book.txt", "--tokens_per_batch", 200)
    for processes in (1, 2):
        done = evaluate(tmp_path, "model", *tasks, "--out", f"out/{processes}.json", processes=processes)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("bits_per_byte") == 1
    assert results(tmp_path / "out" / "1.json") == results(tmp_path / "out" / "2.json")


@pytest.mark.slow
def test_two_models_are_put_side_by_side_and_one_gets_its_card(questions: Path, tmp_path: Path) -> None:
    """One of them is a model of transformers that this project knows nothing of."""
    save(random_model(), tmp_path / "ours")
    stock = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=CONTEXT, vocab_size=50304))
    save(stock, tmp_path / "stock")
    arguments = ("ours", "stock", "--tasks", "pydocs-choice=questions.jsonl", "--bf16", "--update_card")
    done = evaluate(tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    header, *lines, note, _ = done.stdout.splitlines()
    assert header.split() == ["task", "metric", "ours", "stock", "difference", "±", "error"]
    assert [line.split()[1] for line in lines] == ["acc", "acc_norm", "acc_bytes", "acc_token"]
    assert "8 contexts, counted once for each ending, were longer than ours reads" in note
    assert (tmp_path / "stock" / "README.md").is_file()


def test_a_run_is_evaluated_by_its_model(questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(random_model(), tmp_path / "run" / "model")
    arguments = ["evaluate", str(tmp_path / "run"), "--tasks", f"pydocs-choice={questions}", "--limit", "2"]
    run([*arguments, "--update_card"])
    assert "acc_norm" in capsys.readouterr().out
    assert (tmp_path / "run" / "model" / "README.md").is_file() and not (tmp_path / "run" / "README.md").exists()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (
            ["nowhere"],
            "no model 'nowhere': give a folder with config.json and *.safetensors, a run's folder, or",
        ),
        (
            ["nowhere", "--tasks", "helaswag"],
            "unknown task 'helaswag': the tasks are pydocs-choice, pydocs-validation,",
        ),
        (["nowhere", "--tasks", ","], "--tasks names none"),
        (["a", "b", "c"], "give one model, or two different ones to compare, not a b c"),
        (["a", "a"], "give one model, or two different ones to compare, not a a"),
        (["nowhere", "--limit", "0"], "limit=0 must be above zero"),
        (["nowhere", "--tokens_per_batch", "-1"], "tokens_per_batch=-1 must be above zero"),
        (["nowhere", "--seed", "-1"], "seed=-1 must be zero or more"),
        (["nowhere", "--out", "."], "--out . is a folder: name a file"),
        (["nowhere", "--update_card"], "--update_card: 'nowhere' is not a folder"),
    ],
)
def test_what_cannot_be_evaluated_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], problem: str
) -> None:
    monkeypatch.chdir(tmp_path)  # where no runs/ lie, which would be offered
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=re.escape(problem)) as error:
        run(["evaluate", *arguments])
    assert "\n" not in str(error.value)
