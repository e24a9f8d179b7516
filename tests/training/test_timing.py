"""A run that is given a time decides its steps, trains as if it had been given them, and keeps them when it goes on."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fgpt_hf.files import read_json_lines
from fgpt_hf.losses.objectives import Batch
from fgpt_hf.runtime.plan import TrainingPlan
from fgpt_hf.runtime.transfers import HostCopy
from fgpt_hf.training import step_loop, timing
from fgpt_hf.training.records import read_record
from fgpt_hf.training.run_folder import RunFolder
from fgpt_hf.training.timing import step_seconds, time_first_step
from tests.support import loop_run
from tests.support.loop_run import TINY
from tests.training.test_loop import assert_equal_runs, refusal, succeed

pytestmark = pytest.mark.slow

TIMED = ["--max_minutes=12s", "--dropout=0.1", "--warmup_steps=1000", "--eval_steps=100000", "--save_steps=20"]


def main(arguments: Sequence[str]) -> None:
    """Train by a clock on which each step takes 0.1 s, however busy this machine is."""

    def take(train: Callable[[Sequence[Batch]], object], micro_batches: Sequence[Batch]) -> float:
        train(micro_batches)
        return 0.1

    timing.step_seconds = take
    step_loop.spent_seconds = lambda: 1.0  # type: ignore[attr-defined]
    loop_run.main(arguments)


@pytest.fixture(scope="module")
def timed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("timed") / "run"
    return folder, succeed(folder, *TIMED, "--save_total_limit=99", main=main)


def test_the_steps_fit_the_time_and_are_told_with_the_end(timed: tuple[Path, str]) -> None:
    folder, output = timed
    record, last = read_record(folder / "run.yaml"), read_json_lines(folder / "metrics.jsonl")[-1]
    assert record["max_minutes"] == pytest.approx(12 / 60)
    assert record["max_steps"] == last["step"] >= 10
    assert record["warmup_steps"] == record["max_steps"] // 8
    assert f"max_minutes=0.2: {last['step']:,} steps of" in output and "the run ends at about" in output


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
    assert "resuming from step" in output and "steps of" not in output
    assert_equal_runs(folder, timed[0])


def test_another_time_for_a_decided_run_is_refused(timed: tuple[Path, str]) -> None:
    steps = read_record(timed[0] / "run.yaml")["max_steps"]
    answer = refusal(timed[0], *TIMED[1:], "--max_minutes=2h", "--resume_from_checkpoint=latest")
    assert f"max_minutes=120 has no effect on the run in {timed[0]}, whose {steps} steps are decided" in answer


class InventedStepper:
    """Takes no steps, but the time of each micro-batch by its rows; more than four are too many for the memory."""

    SECONDS = {4: 3.0, 2: 1.0, 1: 0.8}

    def __init__(self, clock: list[float]) -> None:
        self.clock, self.plan = clock, TrainingPlan(max_steps=1, rows=8, micro_batches=1, minutes=5.0)
        optimizer = SimpleNamespace(set_learning_rate=lambda rate: None, forget=lambda: None)
        self.state = SimpleNamespace(optimizer=optimizer, accelerator=SimpleNamespace(scaler=None))

    def take(self, micro_batches: Sequence[dict[str, torch.Tensor]], received_signal: int) -> HostCopy:
        if len(micro_batches[0]["labels"]) > 4:
            self.plan = self.plan.with_rows(self.plan.rows // 2)
        self.clock[0] += sum(self.SECONDS[min(4, len(batch["labels"]))] for batch in micro_batches)
        return HostCopy(torch.zeros(1))


@pytest.mark.parametrize(("is_open", "rows", "seconds"), [(True, 2, 4.0), (False, 4, 6.0)])
def test_an_open_micro_batch_is_the_fastest_that_fits(
    monkeypatch: pytest.MonkeyPatch, is_open: bool, rows: int, seconds: float
) -> None:
    clock = [0.0]
    monkeypatch.setattr("fgpt_hf.training.timing.time.perf_counter", lambda: clock[0])
    stepper: Any = InventedStepper(clock)
    batches, measured = time_first_step(stepper, [{"labels": torch.arange(8)}], is_open)
    assert stepper.plan == TrainingPlan(max_steps=1, rows=rows, micro_batches=8 // rows, minutes=5.0)
    assert measured == pytest.approx(seconds)
    assert torch.equal(torch.cat([batch["labels"] for batch in batches]), torch.arange(8))
    assert {len(batch["labels"]) for batch in batches} == {rows}


def test_two_processes_decide_alike(tmp_path: Path) -> None:
    succeed(tmp_path / "run", "--max_minutes=12s", "--per_device_train_batch_size=4", processes=2, main=main)
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


def test_a_run_that_died_before_its_first_checkpoint_decides_anew(timed: tuple[Path, str]) -> None:
    run = replace(TINY, max_minutes=0.2, output_dir=str(timed[0]))
    open_plan = TrainingPlan(run.max_steps, rows=8, micro_batches=1, minutes=0.2)
    folder = RunFolder(replace(run, resume_from_checkpoint="latest"))
    assert folder.decided(open_plan).max_steps == read_record(timed[0] / "run.yaml")["max_steps"]
    assert RunFolder(run).decided(open_plan) == open_plan  # which no checkpoint stands behind


def test_a_run_of_given_steps_says_when_it_ends(tmp_path: Path) -> None:
    assert "a step: the run ends at about" in succeed(tmp_path / "run", "--max_steps=20")
