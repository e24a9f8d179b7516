"""The folder of a run, as the run writes it: reserved, started or resumed, and filled line by line."""

import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from filelock import Timeout

from fgpt_hf.config.runs import Run
from fgpt_hf.errors import UserError
from fgpt_hf.evaluation.benchmark import TaskResult
from fgpt_hf.evaluation.results import results_record, write_results
from fgpt_hf.files import PARTIAL, append_json_line, locked, read_json_lines, write_atomically, write_json_lines
from fgpt_hf.runtime.distributed import from_main_process
from fgpt_hf.runtime.plan import TrainingPlan
from fgpt_hf.training.checkpoints import (
    checkpoint_name,
    checkpoint_to_resume,
    checkpoints,
    rotate,
    set_aside_after,
    step_of,
)
from fgpt_hf.training.continuation import changed_option, decided, describe_change, require_resumable
from fgpt_hf.training.records import METRICS, RECORD, RESULTS, SAMPLES, read_record

logger = logging.getLogger(__name__)


class RunFolder:
    """The folder of one run: `run.yaml`, `metrics.jsonl`, `samples.jsonl`, `figures/`, `checkpoints/` and `model/`.

    No other process can open it while this one has it open. Only the process of rank 0 writes.

    Example:
        >>> from tempfile import mkdtemp
        >>> from fgpt_hf.config.runs import BaseRun
        >>> folder = RunFolder(BaseRun(output_dir=f"{mkdtemp()}/run"))
        >>> with folder.opened():
        ...     folder.begin(TrainingPlan(max_steps=10, rows=4, micro_batches=1))
        >>> read_record(folder.record)["max_steps"]
        10
    """

    def __init__(self, run: Run, rank: int = 0) -> None:
        self.run, self.path, self.is_writer = run, run.folder, rank == 0
        self.checkpoints = self.path / "checkpoints"
        self.model = self.path / "model"
        self.record = self.path / RECORD

    @contextmanager
    def opened(self, fetch: Callable[[], Run] | None = None) -> Iterator[None]:
        """Reserve the folder for this run; nothing in it changes before `begin`, but by `fetch`.

        The same run, if unfinished, resumes from its last checkpoint.

        Args:
            fetch: writes a state from elsewhere into the folder, and returns the run with what to resume from.

        Raises:
            UserError: it holds a finished run or another one, and neither resuming nor overwriting was asked for; it
                holds another run than the one to resume; or another process is writing to it.
        """
        if not self.is_writer:
            yield
            return
        try:
            with locked(self.path.with_name(f".{self.path.name}.lock"), timeout=0):
                if fetch:
                    self.run = fetch()
                self._check()
                yield
        except Timeout as error:
            raise UserError(f"{self.path} is being written to by another run: choose another output_dir") from error

    @cached_property
    def checkpoint(self) -> Path | None:
        """The checkpoint to continue from, its files verified; None if the run starts from its first step.

        Raises:
            UserError: as `checkpoint_to_resume`.
        """
        return checkpoint_to_resume(self.run, self.checkpoints)

    def decided(self, plan: TrainingPlan) -> TrainingPlan:
        """Return the plan with what a resumed run has decided before; every process calls it."""
        if self.is_writer and self.checkpoint is not None:
            plan = decided(plan, self.run, read_record(self.record))
        return from_main_process(plan)

    def begin(self, plan: TrainingPlan, resumed_at: int | None = None) -> None:
        """Record the run, in a new folder, in place of the run to overwrite, or after the step that it continues from.

        Later checkpoints are set aside, and lines of later steps deleted, because the run writes them again. Older
        checkpoints are deleted that a process killed after its last save had left.
        """
        if not self.is_writer:
            return
        if self.run.overwrite_output_dir and resumed_at is None:
            self._delete_run()
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        if resumed_at is not None:
            self._set_aside_after(resumed_at)
            self._rotate(resumed_at)
        for path in (self.path / METRICS, self.path / SAMPLES):
            if path.is_file():
                write_json_lines(path, _lines_until(path, -1 if resumed_at is None else resumed_at))
        for unfinished in self.path.glob(f"*{PARTIAL}"):
            _delete(unfinished)
        self.record_run(plan)

    def _delete_run(self) -> None:
        """Delete what the folder holds: the checkpoints first and all at once, so none is left to resume from."""
        if self.checkpoints.is_dir():
            self.checkpoints.rename(f"{self.checkpoints}{PARTIAL}")
        for path in self.path.iterdir() if self.path.is_dir() else ():
            _delete(path)

    def _set_aside_after(self, step: int) -> None:
        if moved := set_aside_after(self.checkpoints, step):
            names = ", ".join(path.name for path in reversed(moved))
            logger.warning(
                "the run goes back to step %d: its later checkpoints (%s) are set aside in %s; delete them when they "
                "are not needed",
                *(step, names, moved[0].parent),
            )

    def _rotate(self, step: int) -> None:
        checkpoint = self.checkpoints / checkpoint_name(step)
        if checkpoint.is_dir():  # not where the run continues from a checkpoint of another folder
            rotate(self.checkpoints, self.run.save_total_limit, checkpoint)

    def record_run(self, plan: TrainingPlan) -> None:
        """Write the run to `run.yaml`, with the plan in place of what the run left open."""
        if self.is_writer:
            write_atomically(self.record, plan.fill_in(self.run).to_yaml())

    def append_metrics(self, line: Mapping[str, float]) -> None:
        """Add a line to `metrics.jsonl`; it holds the step that it belongs to."""
        if self.is_writer:
            append_json_line(self.path / METRICS, line)

    def append_sample(self, line: Mapping[str, str | int]) -> None:
        """Add a line to `samples.jsonl`; it holds the step that it belongs to."""
        if self.is_writer:
            append_json_line(self.path / SAMPLES, line)

    def record_results(self, accelerator: Accelerator, results: Sequence[TaskResult]) -> None:
        """Write the last results of the run's benchmarks to `results.json`, if there are any."""
        if self.is_writer and results:
            settings = {"precision": accelerator.mixed_precision, "processes": accelerator.num_processes}
            record = results_record(results, settings, self.run.eval_task_limit)
            write_results(self.path / RESULTS, record.to_json())

    def _check(self) -> None:
        """Raise UserError unless the folder is free for the run, or holds what it continues."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"output_dir={self.path} is a file: give a folder")
        holds_run = self.record.is_file()
        if holds_run and self.run.resume_from_checkpoint is None and not self.run.overwrite_output_dir:
            self._require_unfinished(read_record(self.record))
            self.run = replace(self.run, resume_from_checkpoint="latest")
            logger.info("%s holds this run, unfinished: resuming%s", self.path, self._from_where())
        if self.run.resume_from_checkpoint is not None:
            self._check_resumable(holds_run)

    def _require_unfinished(self, recorded: Mapping[str, object]) -> None:
        """Raise UserError if the folder holds another run, or this one finished."""
        ways = "replace it with --overwrite_output_dir, or choose another --output_dir"
        if name := changed_option(self.run, recorded):
            is_fixed = name in self.run.fixed_on_resume()
            resume = "" if is_fixed else "continue it with --resume_from_checkpoint latest, "
            change = describe_change(name, self.run, recorded)
            raise UserError(f"{self.path} already holds a run, with {change}: {resume}{ways}")
        last = recorded.get("max_steps")
        if self.model.exists() and isinstance(last, int) and self._last_step() >= last:
            raise UserError(
                f"{self.path} already holds this run, finished: train on with --resume_from_checkpoint latest and more "
                f"--max_steps than {last}, {ways}"
            )

    def _last_step(self) -> float:
        """Return the step of the newest checkpoint; infinity if there is a model without one."""
        return next((step_of(path) for path in checkpoints(self.checkpoints)), math.inf)

    def _from_where(self) -> str:
        return f" from step {step_of(self.checkpoint):,}" if self.checkpoint else ""

    def _check_resumable(self, holds_run: bool) -> None:
        if holds_run:
            require_resumable(self.run, read_record(self.record), self.path)
        if self.checkpoint is not None and not holds_run:
            raise UserError(f"{self.path} holds checkpoints but no {RECORD}, so it is unknown what run they are of")
        if self.checkpoint is None and self.model.exists():
            raise UserError(
                f"{self.path} holds a model but no checkpoint to continue from: choose another output_dir, or start "
                "over with --overwrite_output_dir instead of --resume_from_checkpoint"
            )
        if self.checkpoint is None:
            logger.info("%s holds no checkpoint yet: the run starts from its first step", self.path)


def _lines_until(path: Path, last: int) -> list[dict[str, Any]]:
    lines = read_json_lines(path)
    for number, line in enumerate(lines, start=1):
        if not isinstance(line.get("step"), int):
            raise UserError(f"{path} is damaged: line {number} has no step")
    return [line for line in lines if line["step"] <= last]


def _delete(path: Path) -> None:
    """Delete a file, a link or a whole folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
