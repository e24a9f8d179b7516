"""A run that is given a time decides its steps, trains as if it had been given them, and keeps them when it goes on."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from fgpt_hf.files import read_json_lines
from fgpt_hf.training.run_folder import read_record
from fgpt_hf.training.timing import step_seconds
from tests.training.test_loop import assert_equal_runs, refusal, succeed

TIMED = ["--max_minutes=8s", "--dropout=0.1", "--warmup_steps=1000", "--eval_steps=100000", "--save_steps=50"]


@pytest.fixture(scope="module")
def timed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("timed") / "run"
    return folder, succeed(folder, *TIMED, "--save_total_limit=99")


def test_the_steps_fit_the_time_and_are_told_with_the_end(timed: tuple[Path, str]) -> None:
    folder, output = timed
    record, last = read_record(folder / "run.yaml"), read_json_lines(folder / "metrics.jsonl")[-1]
    assert record["max_minutes"] == pytest.approx(8 / 60)
    assert record["max_steps"] == last["step"] >= 10
    assert record["warmup_steps"] == record["max_steps"] // 8
    assert f"max_minutes=0.133333: {last['step']:,} steps of" in output and "the run ends at about" in output


def test_the_trajectory_is_that_of_a_run_that_was_given_the_steps(timed: tuple[Path, str], tmp_path: Path) -> None:
    """The timing leaves weights, dropout's random numbers, the optimizer's state and the order of rows untouched."""
    steps = {name: read_record(timed[0] / "run.yaml")[name] for name in ("max_steps", "warmup_steps")}
    flags = [f"--{name}={value}" for name, value in steps.items()]
    succeed(tmp_path / "run", "--dropout=0.1", "--eval_steps=100000", "--save_steps=100000", *flags)
    assert_equal_runs(timed[0], tmp_path / "run")


def test_the_same_command_keeps_the_steps_that_were_decided(timed: tuple[Path, str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(timed[0], folder)
    shutil.rmtree(folder / "model")
    steps = read_record(folder / "run.yaml")["max_steps"]
    shutil.rmtree(folder / "checkpoints" / f"step_{steps:08d}")
    output = succeed(folder, *TIMED, "--save_total_limit=99")
    assert "it goes on from step" in output and "steps of" not in output
    assert_equal_runs(folder, timed[0])


def test_another_time_for_a_decided_run_is_refused(timed: tuple[Path, str]) -> None:
    steps = read_record(timed[0] / "run.yaml")["max_steps"]
    answer = refusal(timed[0], *TIMED[1:], "--max_minutes=2h", "--resume_from_checkpoint=latest")
    assert f"max_minutes=120 has no effect on the run in {timed[0]}, whose {steps} steps are decided" in answer


def test_an_open_micro_batch_is_the_fastest_of_those_that_were_timed(tmp_path: Path) -> None:
    flags = ["--max_minutes=7s", "--auto_find_batch_size", "--rows_that_fit=4", "--eval_steps=100000"]
    succeed(tmp_path / "run", *flags)
    record = read_record(tmp_path / "run" / "run.yaml")
    assert record["per_device_train_batch_size"] in (1, 2, 4)
    assert record["per_device_train_batch_size"] * record["gradient_accumulation_steps"] == 8


@pytest.mark.slow
def test_two_processes_decide_alike(tmp_path: Path) -> None:
    succeed(tmp_path / "run", "--max_minutes=8s", "--per_device_train_batch_size=4", processes=2)
    assert read_record(tmp_path / "run" / "run.yaml")["max_steps"] >= 10


def test_a_time_that_ten_steps_exceed_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    answer = refusal(tmp_path / "run", "--max_minutes=1s")
    assert "max_minutes=0.0166667 is too short for 10 steps: each takes" in answer
    assert "after the start; try --max_minutes 1, fewer rows per step, or a smaller --preset" in answer
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--max_minutes=soon"], "argument --max_minutes/--max-minutes: 'soon' is not a duration, such as 30, 90s, 2h"),
        (["--max_minutes=-5"], "max_minutes=-5.0 must be above zero"),
        (["--max_minutes=5", "--max_steps=5"], "max_steps and max_minutes exclude each other: give one of them"),
        (["--max_minutes="], "'' is not a duration"),
    ],
)
def test_what_is_no_time_is_one_line(tmp_path: Path, flags: list[str], said: str) -> None:
    assert said in refusal(tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()


def test_many_micro_batches_are_not_all_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of 32 micro-batches of 2 s, after which the weights take 1 s to move."""
    clock = [0.0]

    def train(batches: Sequence[dict[str, torch.Tensor]]) -> None:
        clock[0] += 2.0 * len(batches) + 1.0

    monkeypatch.setattr("fgpt_hf.training.timing.time.perf_counter", lambda: clock[0])
    assert step_seconds(train, [{}] * 32) == pytest.approx(65.0)
    assert clock[0] < 40


def test_a_run_that_died_before_its_first_checkpoint_decides_anew(timed: tuple[Path, str], tmp_path: Path) -> None:
    shutil.copytree(timed[0], tmp_path / "run")
    for name in ("model", "checkpoints"):
        shutil.rmtree(tmp_path / "run" / name)
    output = succeed(tmp_path / "run", *TIMED, "--save_total_limit=99")
    assert "it goes on\n" in output and "steps of" in output


def test_a_run_of_given_steps_says_when_it_ends(tmp_path: Path) -> None:
    assert "a step: the run ends at about" in succeed(tmp_path / "run", "--max_steps=20")
