"""What a training command can know before it reads data, it says before: in one line, and nothing is left behind."""

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from accelerate.state import AcceleratorState

from fgpt_hf.cli import train_base, train_instruct, train_preference
from fgpt_hf.errors import UserError
from tests.support.tiny import random_model, save

BASE = ["--hidden_size=16", "--num_hidden_layers=1", "--num_attention_heads=2", "--max_position_embeddings=64"]
LOADERS = {
    train_base: "load_pretraining_data",
    train_instruct: "load_instruct_data",
    train_preference: "load_preference_data",
}


class ReadData(Exception):
    """The command came to its data."""


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(random_model(), tmp_path_factory.mktemp("start"))


def call(command: ModuleType, start: Path, folder: Path, *flags: str) -> None:
    """Run a command up to its data."""
    shape = BASE if command is train_base else [f"--model_name_or_path={start}", "--max_new_tokens=8"]

    def read(*given: Any) -> None:
        raise ReadData

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, LOADERS[command], read)
        command.main(["--preset=quickstart", *shape, "--eval_tasks=", f"--output_dir={folder}", *flags])


@pytest.mark.parametrize("command", LOADERS, ids=lambda command: command.__name__)
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--eval_tasks=hellaswagg"], "unknown task 'hellaswagg': the tasks are"),
        (["--eval_tasks=pydocs-choice=nowhere.jsonl"], "nowhere.jsonl: there is no such file"),
        (["--eval_tasks=pydocs-choice,pydocs-choice"], "eval_tasks names pydocs-choice twice"),
        (["--optim=sgd"], "optim='sgd' is unknown: choose from muon, adamw"),
        (["--attn_implementation=flash_attention_2"], "attn_implementation=flash_attention_2 is not installed"),
        (["--attn_implementation=flex_attention"], "flex_attention cannot train on a cpu"),
        (["--attn_implementation=flash"], "attn_implementation='flash' is unknown: choose from auto, sdpa, eager"),
        (["--attn_implementation=somebody/kernel"], "or a kernel of the Hub such as kernels-community/flash-attn3"),
        (["--attn_implementation=kernels-community/flash-attn3"], "needs the package kernels: pip install"),
        (["--resume_from_checkpoint=latest", "--overwrite_output_dir"], "exclude each other: give one of them"),
        (["--resume_from_checkpoint=nowhere"], "nowhere: there is no such folder"),
    ],
)
def test_a_mistake_is_refused(command: ModuleType, start: Path, tmp_path: Path, flags: list[str], said: str) -> None:
    with pytest.raises(UserError) as refused:
        call(command, start, tmp_path / "run", *flags)
    assert said in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", [train_base, train_instruct], ids=lambda command: command.__name__)
def test_a_micro_batch_far_above_the_machine_is_refused(command: ModuleType, start: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="=100000000 takes .* GB, and this cpu has .* GB: up to .* rows fit: try"):
        call(command, start, tmp_path / "run", "--per_device_train_batch_size=100000000")


@pytest.mark.parametrize("flags", [["--max_position_embeddings=5"], ["--sample_prompt=" + "word " * 64]])
def test_a_context_too_short_for_the_sample_prompt_is_refused(start: Path, tmp_path: Path, flags: list[str]) -> None:
    with pytest.raises(UserError, match="sample_prompt has .* tokens, which leaves no room in a context of"):
        call(train_base, start, tmp_path / "run", *flags)


@pytest.mark.parametrize("command", [train_instruct, train_preference], ids=lambda command: command.__name__)
def test_a_context_too_short_for_an_answer_is_refused(command: ModuleType, start: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="max_new_tokens=60 leaves no room for a prompt in a context of 64 tokens"):
        call(command, start, tmp_path / "run", "--max_new_tokens=60")


def test_a_benchmark_with_an_ending_longer_than_the_context_is_refused(start: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the ending .* has .* tokens of its own, and the model can score 1 to 16"):
        call(train_base, start, tmp_path / "run", "--max_position_embeddings=16", "--eval_tasks=pydocs-choice")


@pytest.mark.parametrize("command", LOADERS, ids=lambda command: command.__name__)
def test_what_is_right_comes_to_its_data(command: ModuleType, start: Path, tmp_path: Path) -> None:
    with pytest.raises(ReadData):
        call(command, start, tmp_path / "run", "--eval_tasks=pydocs-choice", "--eval_task_limit=8")
    assert not (tmp_path / "run").exists()
