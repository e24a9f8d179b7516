"""The harness' own tasks through our scorer: for each example what its `hf` model gives."""

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from fgpt_hf.cli.main import run
from fgpt_hf.errors import UserError
from tests.support.tiny import random_model, save

try:
    import lm_eval
    from lm_eval.tasks import TaskManager

    from fgpt_hf.evaluation.harness import FGPTHarnessModel
except ImportError:
    lm_eval = None
needs_lm_eval = pytest.mark.skipif(lm_eval is None, reason="lm_eval is not installed: pip install 'fgpt-hf[harness]'")

WORDS = ["cat", "sat", "mat", "river", "blue", "seven", "because", "never", "went", "house", "the", "of"]
EXAMPLES = 6
# What each task asks for, in the shape of a well-known one.
TASKS: dict[str, dict[str, Any]] = {
    "like_arc": {
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{label}}",
        "doc_to_choice": "{{choices}}",
        "fewshot_split": "train",
        "num_fewshot": 2,
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "like_hellaswag": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{label}}",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "like_boolq": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}\nQuestion: {{question}}?\nAnswer:",
        "doc_to_target": "{{label % 2}}",
        "doc_to_choice": ["no", "yes"],
        "metric_list": [{"metric": "acc"}],
    },
    "like_winogrande": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{label % 2}}",
        "doc_to_target": "{{' ' + question}}",
        "doc_to_choice": "{{[text + ' ' + choices[0], text + ' ' + choices[1]]}}",
        "metric_list": [{"metric": "acc"}],
    },
    "like_lambada": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{' ' + choices[0]}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "like_wikitext": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{page}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "like_gsm8k": {
        "output_type": "generate_until",
        "doc_to_text": "Q: {{question}}\nA:",
        "doc_to_target": "{{' ' + choices[0]}}",
        "fewshot_split": "train",
        "num_fewshot": 1,
        "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 8},
        "metric_list": [{"metric": "exact_match"}],
    },
    "without_context": {
        "output_type": "multiple_choice",
        "doc_to_text": "",
        "doc_to_target": "{{label}}",
        "doc_to_choice": "{{choices}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    },
}


def words(source: random.Random, count: int) -> str:
    return " ".join(source.choices(WORDS, k=count))


def rows(seed: int, count: int) -> list[dict[str, Any]]:
    """Questions with endings of different lengths, some of which begin alike, and pages longer than the context."""
    source = random.Random(seed)
    found = []
    for index in range(count):
        start = words(source, 2)
        choices = [words(source, 1), f"{start} {words(source, 1)}", f"{start} {words(source, 4)}", words(source, 3)]
        row = {"question": words(source, 3), "text": words(source, 12), "choices": choices, "label": index % 4}
        found.append({**row, "page": f"= {start} =\n\n" + words(source, 30 + 40 * index)})
    return found


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    files = {}
    for split, seed, count in (("train", 1, 4), ("test", 2, EXAMPLES)):
        file = folder / f"{split}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows(seed, count)))
        files[split] = str(file)
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": files}, "test_split": "test"}
    for name, task in TASKS.items():
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **source, **task}))  # JSON is YAML
    return folder


def shape(**changes: int) -> dict[str, Any]:
    common = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=50304)
    return {**common, "max_position_embeddings": 64, "num_key_value_heads": 2, **changes}


def with_large_weights(model: PreTrainedModel) -> PreTrainedModel:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(mean=1.0 if parameter.dim() == 1 else 0.0, std=0.15)
    return model


MODELS = {
    "FGPT": random_model,
    "Llama": lambda: with_large_weights(LlamaForCausalLM(LlamaConfig(**shape()))),
    "Mistral with a window, which reads no trees": lambda: with_large_weights(
        MistralForCausalLM(MistralConfig(**shape(sliding_window=8)))
    ),
}


def evaluate(model: str, folder: Path, tasks: Path) -> dict[str, Any]:
    results = lm_eval.simple_evaluate(
        model=model,
        model_args={"pretrained": str(folder), "dtype": "float32"},
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        device="cpu",
        batch_size=2,
        bootstrap_iters=0,
        log_samples=True,
    )
    assert results is not None
    return dict(results)


@needs_lm_eval
@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_each_example_of_each_task_gets_what_hf_gives_it(name: str, tasks: Path, tmp_path: Path) -> None:
    folder = save(MODELS[name](), tmp_path / "model")
    own, expected = (evaluate(model, folder, tasks) for model in ("fgpt", "hf"))
    for task in TASKS:
        assert len(own["samples"][task]) == EXAMPLES
        for found, wanted in zip(own["samples"][task], expected["samples"][task], strict=True):
            assert found["arguments"] == wanted["arguments"]
            assert_equal(found["resps"], wanted["resps"])
        for metric, value in expected["results"][task].items():
            if isinstance(value, float):
                assert own["results"][task][metric] == pytest.approx(value, rel=1e-5), (task, metric)


def assert_equal(found: Any, wanted: Any) -> None:
    """Texts and verdicts are equal, log-likelihoods but for the rounding of float32."""
    if isinstance(wanted, float):
        assert found == pytest.approx(wanted, rel=1e-5, abs=1e-4)
    elif isinstance(wanted, (list, tuple)):
        for one, other in zip(found, wanted, strict=True):
            assert_equal(one, other)
    else:
        assert found == wanted


@needs_lm_eval
@pytest.mark.slow
def test_the_command_runs_the_tasks_of_a_run_and_writes_the_harness_results(
    tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(random_model(), tmp_path / "run" / "model")
    monkeypatch.setattr(sys, "argv", ["fgpt"])
    given = [f"--model_args=pretrained={tmp_path / 'run'},tokens_per_batch=64", "--device=cpu"]
    where = [f"--include_path={tasks}", f"--output_path={tmp_path / 'out'}"]
    run(["lm-eval", *given, *where, "--tasks=like_arc,like_wikitext", "--limit=3"])
    assert "like_arc" in capsys.readouterr().out
    (written,) = (tmp_path / "out").rglob("results*.json")
    found = json.loads(written.read_text())
    assert found["config"]["model"] == "fgpt" and found["n-samples"]["like_arc"]["effective"] == 3


@needs_lm_eval
def test_an_ending_that_the_model_cannot_score_is_refused(tmp_path: Path) -> None:
    model = FGPTHarnessModel(str(save(random_model(), tmp_path / "model")), device="cpu")
    for ending in ([], list(range(65))):
        with pytest.raises(
            UserError, match=f"a continuation has {len(ending)} tokens, and the model can score 1 to 64"
        ):
            model._loglikelihood_tokens([(None, [5], ending)])


def test_without_the_harness_one_line_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fgpt_hf.cli.lm_eval.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs lm-evaluation-harness: pip install 'fgpt-hf\[harness\]'"):
        run(["lm-eval", "--tasks", "hellaswag"])
