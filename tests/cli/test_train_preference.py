"""The journey from a model and pairs of replies to a model that prefers the chosen ones."""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from datasets import load_dataset
from safetensors.torch import load_file
from transformers import GenerationConfig
from trl import DPOConfig, DPOTrainer

from fgpt_hf.cli.train_preference import main
from fgpt_hf.files import read_json_lines
from fgpt_hf.model.io import load_model
from fgpt_hf.tokenizer.tokenizer import GENERATION_IDS
from tests.support.tiny import random_model, save

pytestmark = pytest.mark.slow

REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model and 60 pairs of which politeness is chosen, one of them flawed."""
    home = tmp_path_factory.mktemp("home")
    model = random_model()
    model.generation_config = GenerationConfig(**GENERATION_IDS)
    save(model, home / "start")
    rows = [{"prompt": f"Say {n}", "chosen": f"Gladly: {n}", "rejected": f"No, not {n}!"} for n in range(60)]
    rows[7]["rejected"] = rows[7]["chosen"]
    (home / "pairs.json").write_text(json.dumps(rows))
    return home


def flags(home: Path, output: Path, *more: str) -> list[str]:
    return [
        "--preset=rasbt",
        f"--model_name_or_path={home / 'start'}",
        f"--dataset_name={home / 'pairs.json'}",
        f"--output_dir={output}",
        "--validation_fraction=0.2",
        "--per_device_train_batch_size=4",
        "--learning_rate=0.003",
        "--max_steps=12",
        "--warmup_steps=2",
        "--eval_steps=6",
        "--save_steps=6",
        "--sample_steps=12",
        "--max_new_tokens=8",
        "--bf16=false",
        *more,
    ]


@pytest.fixture(scope="module", autouse=True)
def alone(home: Path) -> Iterator[None]:
    """A cache of its own, and no accelerator from another test or for another one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fgpt_hf.training.finetuning.HF_HOME", str(home / "cache"))
        yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def trained(home: Path) -> Path:
    main(flags(home, home / "run"))
    return home / "run"


def test_the_chosen_replies_become_the_likelier_ones_validation_too(trained: Path) -> None:
    lines = read_json_lines(trained / "metrics.jsonl")
    validation = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in validation] == [0, 6, 12]
    assert validation[0]["eval_loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert validation[-1]["eval_loss"] < 0.5
    assert validation[-1]["eval_rewards/margins"] > 0.5
    assert validation[-1]["eval_rewards/accuracies"] == 1.0
    assert all(name in line for line in lines for name in REWARDS if "loss" in line)


def test_a_resumed_run_is_the_run_that_was_not_interrupted(
    home: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its checkpoint holds the reference, which another machine would have to compute again, and would round anew."""
    monkeypatch.setattr("fgpt_hf.training.finetuning.HF_HOME", str(home / "empty"))
    monkeypatch.setattr("fgpt_hf.training.finetuning.Scorer", lambda *given: pytest.fail("computed again"))
    again = home / "again"
    shutil.copytree(trained, again)
    shutil.rmtree(again / "checkpoints" / "step_00000012")
    shutil.rmtree(again / "model")
    main(flags(home, again, "--resume_from_checkpoint=latest"))
    weights, expected = (load_file(folder / "model" / "model.safetensors") for folder in (again, trained))
    assert all(torch.equal(weights[name], weight) for name, weight in expected.items())
    for line, other in zip(
        read_json_lines(again / "metrics.jsonl"), read_json_lines(trained / "metrics.jsonl"), strict=True
    ):
        exact = {name for name in other if "loss" in name or "rewards" in name or name in ("step", "tokens")}
        assert {name: line[name] for name in exact} == {name: other[name] for name in exact}


@pytest.mark.parametrize("loss_type", ["ipo", "simpo"])
def test_length_normalised_losses_move_the_margin_too(home: Path, loss_type: str) -> None:
    main(flags(home, home / loss_type, f"--loss_type={loss_type}", "--sample_steps=99"))
    validation = [line for line in read_json_lines(home / loss_type / "metrics.jsonl") if "eval_loss" in line]
    assert validation[-1]["eval_loss"] < validation[0]["eval_loss"]
    assert validation[-1]["eval_rewards/margins"] > validation[0]["eval_rewards/margins"]


def test_adapters_learn_the_same_preference_and_leave_a_whole_model(home: Path) -> None:
    main(flags(home, home / "lora", "--use_peft", "--lora_r=4", "--learning_rate=0.03", "--sample_steps=99"))
    validation = [line for line in read_json_lines(home / "lora" / "metrics.jsonl") if "eval_loss" in line]
    assert validation[0]["eval_loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert validation[-1]["eval_rewards/margins"] > 0.5
    whole, start = (load_file(folder / "model.safetensors") for folder in (home / "lora" / "model", home / "start"))
    assert whole.keys() == start.keys()


def test_what_a_run_takes_is_said_and_an_open_micro_batch_is_chosen(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    step = ["--max_steps=0", "--num_train_epochs=1", "--gradient_accumulation_steps=8", "--sample_steps=99"]
    main(flags(home, home / "open", *step, "--per_device_train_batch_size=auto"))
    assert "2 steps x at most 4,096 tokens" in caplog.text and "with micro-batches of 32 rows" in caplog.text
    record = yaml.safe_load((home / "open" / "run.yaml").read_text())
    assert (record["per_device_train_batch_size"], record["gradient_accumulation_steps"]) == (32, 1)
    assert [line["step"] for line in read_json_lines(home / "open" / "metrics.jsonl")][-1] == 2


def test_a_run_that_cannot_fit_is_refused_before_the_reference(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fgpt_hf.runtime.hardware._free_memory_bytes", lambda: 10**7)
    monkeypatch.setattr(
        "fgpt_hf.cli.train_preference.reference_log_probabilities", lambda *given: pytest.fail("too early")
    )
    with pytest.raises(ValueError, match="more than the 0.01 GB of this cpu"):
        main(flags(home, home / "large"))
    assert not (home / "large").exists()


def test_flawed_rows_are_told_or_refused(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    main(flags(home, home / "told", "--max_steps=1"))
    assert f"1 left out, 'chosen' equals 'rejected': row 7 of {home / 'pairs.json'}" in caplog.text
    with pytest.raises(ValueError, match="row 7 of .*'chosen' equals 'rejected'"):
        main(flags(home, home / "refused", "--bad_rows=refuse"))
    assert not (home / "refused").exists()


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--loss_type=hinge", "loss_type"),
        ("--beta=0", "beta=0.0 must be above zero"),
        ("--label_smoothing=0.5", "label_smoothing=0.5 must be zero or more and below 0.5"),
        ("--validation_fraction=1", "validation_fraction=1.0 must be zero or more and below 1"),
        ("--max_length=65", "max_length=65 is longer than the model's context of 64 tokens"),
        ("--max_length=4", "its prompt alone is longer than 4 tokens"),
        ("--model_name_or_path=nowhere", "nowhere"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing_behind(
    home: Path, flag: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=said):
        main(flags(home, home / "bad", flag))
    assert not (home / "bad").exists()


def test_a_run_that_holds_no_pair_out_trains_without_measuring(home: Path) -> None:
    main(flags(home, home / "all", "--validation_fraction=0", "--max_steps=2"))
    metrics = read_json_lines(home / "all" / "metrics.jsonl")
    assert metrics and not any(name.startswith("eval_") for line in metrics for name in line)


def test_the_folder_trains_in_trls_dpo_trainer_unchanged(home: Path, trained: Path, tmp_path: Path) -> None:
    """The example of docs/preference.md."""
    model, tokenizer = load_model(str(trained / "model"))
    data = load_dataset("json", data_files=str(home / "pairs.json"), split="train")
    config = DPOConfig(str(tmp_path), max_steps=2, use_cpu=True, bf16=False, report_to="none", save_strategy="no")
    trainer = DPOTrainer(model, args=config, train_dataset=data, processing_class=tokenizer)
    assert math.isfinite(trainer.train().training_loss)
