"""The journey of a newcomer: documents in a file to a folder that transformers loads without this package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fgpt_hf.files import read_json_lines
from fgpt_hf.model.io import load_fgpt
from tests.support.forked import run_command

pytestmark = pytest.mark.slow

TINY = [
    "--preset=quickstart",
    "--hidden_size=16",
    "--num_hidden_layers=2",
    "--num_attention_heads=2",
    "--max_position_embeddings=64",
    "--max_steps=12",
    "--warmup_steps=2",
    "--learning_rate=0.01",
    "--max_eval_rows=8",
    "--eval_tasks=",
]


def train(*flags: object) -> subprocess.CompletedProcess[str]:
    return run_command("train_base.py", *TINY, *flags)


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "documents.jsonl"
    lines = [{"text": f"Document {n} says that {n} and {n + 1} make {2 * n + 1}. " * (1 + n % 7)} for n in range(400)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def trained(documents: Path) -> tuple[Path, str]:
    folder = documents.parent / "run"
    choices = documents.with_name("choices.jsonl")
    endings = [f"{end} says." for end in ("Document", "that", "and", "make")]
    rows = [{"context": f"Number {n} of", "endings": endings, "label": n % 4} for n in range(8)]
    choices.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = train(f"--dataset_name={documents}", f"--output_dir={folder}", f"--eval_tasks=pydocs-choice={choices}")
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_the_run_learns_and_says_what_a_newcomer_wants_to_know(trained: tuple[Path, str]) -> None:
    folder, output = trained
    validation = [line["eval_loss"] for line in read_json_lines(folder / "metrics.jsonl") if "eval_loss" in line]
    assert validation[-1] < validation[0] - 1
    for expected in (
        "parameters",
        "first training step done",
        "tokens will be seen",
        "validation loss",
        "Once upon a time",
    ):
        assert expected in output


def test_benchmarks_are_run_before_and_after_and_kept_for_the_card(trained: tuple[Path, str]) -> None:
    folder, output = trained
    measured = [line for line in read_json_lines(folder / "metrics.jsonl") if "pydocs-choice/acc_norm" in line]
    assert [line["step"] for line in measured] == [0, 12]
    (values,) = json.loads((folder / "results.json").read_text())["tasks"].values()
    assert values["acc_norm"] == measured[-1]["pydocs-choice/acc_norm"]
    assert "pydocs-choice/acc_norm" in output


def test_samples_hold_the_fixed_prompt_and_one_of_the_corpus_before_and_after(trained: tuple[Path, str]) -> None:
    samples = read_json_lines(trained[0] / "samples.jsonl")
    assert {line["step"] for line in samples} == {0, 12}
    prompts = {line["prompt"] for line in samples}
    assert "Once upon a time" in prompts and any(prompt.startswith("Document") for prompt in prompts)
    assert {"step", "prompt", "greedy", "sampled"} == samples[0].keys()


def test_a_run_that_holds_nothing_out_says_what_that_costs_and_trains(documents: Path, tmp_path: Path) -> None:
    done = train(f"--dataset_name={documents}", f"--output_dir={tmp_path / 'run'}", "--validation_fraction=0")
    assert done.returncode == 0, done.stderr
    assert "validation_fraction=0 holds nothing out: there will be no validation loss" in done.stdout + done.stderr
    metrics = read_json_lines(tmp_path / "run" / "metrics.jsonl")
    assert not any("eval_loss" in line for line in metrics)
    assert {line["prompt"] for line in read_json_lines(tmp_path / "run" / "samples.jsonl")} == {"Once upon a time"}
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "No document was held out for validation" in card


STRANGER = """
import sys
sys.modules["fgpt_hf"] = None  # cannot be imported
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline
folder = sys.argv[1]
assert AutoConfig.from_pretrained(folder, trust_remote_code=True).model_type == "fgpt"
assert type(AutoModel.from_pretrained(folder, trust_remote_code=True)).__name__ == "FGPTModel"
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer("Document 7 says", return_tensors="pt")
options = {"max_new_tokens": 20, "do_sample": False}
texts = [model.generate(**inputs, **options, use_cache=cache).tolist() for cache in (True, False)]
assert texts[0] == texts[1]
chat = pipeline("text-generation", model=model, tokenizer=tokenizer)
reply = chat([{"role": "user", "content": "What do 3 and 4 make? <|end|>"}], max_new_tokens=5)[0]["generated_text"]
assert [message["role"] for message in reply] == ["user", "assistant"]
assert isinstance(reply[1]["content"], str)
"""


def test_a_process_without_this_package_loads_generates_and_chats(trained: tuple[Path, str], tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, str(trained[0] / "model")],
        cwd=tmp_path,
        env=environment | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_bad_input_is_one_line_and_leaves_nothing_behind(documents: Path, tmp_path: Path) -> None:
    answers = {
        "--hidden_size=17": "hidden_size=17 must divide evenly among num_attention_heads=2",
        "--norm=batchnorm": "norm='batchnorm' is unknown; choose from layernorm, rmsnorm",
        "--dataset_name=nowhere.jsonl": "there is no such file",
        "--dataset_name=nowhere": "nowhere",
        "--text_column_name=body": "has no column 'body': text_column_name can be one of text",
        "--validation_fraction=1": "must be zero or more and below 1",
    }
    for flag, answer in answers.items():
        done = train(f"--dataset_name={documents}", f"--output_dir={tmp_path / 'run'}", flag)
        assert done.returncode == 2, done.stderr
        assert answer in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "run").exists()


def test_a_run_with_other_blocks_learns_goes_on_and_is_refused_as_another_network(
    documents: Path, tmp_path: Path
) -> None:
    blocks = ["--position_embedding=rope", "--norm=rmsnorm", "--qk_norm", "--mlp=gated", "--hidden_act=silu"]
    blocks += ["--attention_bias=false", "--mlp_bias=false", "--num_key_value_heads=1", "--zero_init_residual"]
    blocks += ["--tie_word_embeddings=false", "--final_logit_softcapping=20", "--weight_decay_scheduler_type=cosine"]
    given = [*blocks, f"--dataset_name={documents}", f"--output_dir={tmp_path}"]
    assert (done := train(*given, "--max_steps=8", "--save_steps=4")).returncode == 0, done.stderr
    again = [*given, "--resume_from_checkpoint=latest"]
    assert (done := train(*again)).returncode == 0, done.stderr
    validation = [line["eval_loss"] for line in read_json_lines(tmp_path / "metrics.jsonl") if "eval_loss" in line]
    assert validation[-1] < validation[0] - 0.5
    model, _ = load_fgpt(str(tmp_path))
    assert model.config.position_embedding == "rope" and not model.config.tie_word_embeddings
    done = train(*again, "--norm=layernorm", "--max_steps=14")
    assert done.returncode == 2 and "holds a run with norm=rmsnorm" in done.stderr
    record = tmp_path / "run.yaml"
    record.write_text(record.read_text().replace("norm: rmsnorm", "norm: layernorm"))
    done = train(*again, "--norm=layernorm", "--max_steps=14")
    assert done.returncode == 2 and "holds a network with norm='rmsnorm'" in done.stderr.splitlines()[-1]


def test_a_mistake_does_not_cost_the_run_that_was_to_be_overwritten(trained: tuple[Path, str], documents: Path) -> None:
    before = (trained[0] / "metrics.jsonl").read_text()
    done = train(f"--output_dir={trained[0]}", "--overwrite_output_dir", "--dataset_name=nowhere.jsonl")
    assert done.returncode == 2
    assert (trained[0] / "metrics.jsonl").read_text() == before
