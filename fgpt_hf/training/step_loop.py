"""Take the steps of a run, and log, check and save what is due after them."""

import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple, NoReturn, Protocol

from tqdm.auto import tqdm

from fgpt_hf.config.runs import Run
from fgpt_hf.config.schedules import learning_rate_factor, weight_decay_factor
from fgpt_hf.errors import UserError
from fgpt_hf.losses.objectives import Batch
from fgpt_hf.runtime.distributed import evaluating, from_main_process
from fgpt_hf.runtime.duration import (
    MIN_STEPS,
    CheckTime,
    Steps,
    closing_seconds,
    duration,
    require_steps,
    time_of_day,
)
from fgpt_hf.runtime.hardware import peak_memory_bytes, this_machine
from fgpt_hf.runtime.plan import TrainingPlan
from fgpt_hf.runtime.workload import Workload
from fgpt_hf.training.advice import Adviser, RunFacts, bits_of_base
from fgpt_hf.training.outlook import Epoch, Forecast
from fgpt_hf.training.profiling import profiled
from fgpt_hf.training.records import read_metrics
from fgpt_hf.training.run_folder import RunFolder
from fgpt_hf.training.step import Step, Stepper, TakenStep
from fgpt_hf.training.timing import spent_seconds, time_first_step

logger = logging.getLogger(__name__)

LINE_LENGTH = 79  # of the progress bar in a file


class Check(Protocol):
    """A measurement before the first step, every `every_steps` steps and after the last one."""

    @property
    def every_steps(self) -> int: ...

    def __call__(self, step: int) -> Mapping[str, float]:
        """Return what to log, by name. Every process calls it."""


class _QueuedStep(NamedTuple):
    """A step on its way: what it reads and how, and whether something that is due after it needs its weights."""

    taken: TakenStep
    tokens: int
    learning_rate: float
    is_awaited: bool


class StepLoop:
    """The steps of a run, with what is logged, checked and saved along the way.

    Args:
        stepper: takes the steps, and holds the state and the plan.
        run: the options.
        folder: where metrics and checkpoints are written.
        checks: measurements to take along the way.
        epoch: the size of the training data, if it is known.
        on_checkpoint: called with the path of every checkpoint that was written.
    """

    def __init__(
        self,
        stepper: Stepper,
        run: Run,
        folder: RunFolder,
        checks: Sequence[Check],
        epoch: Epoch | None,
        on_checkpoint: Callable[[Path], None],
    ) -> None:
        self.run, self.folder, self.checks, self.epoch = run, folder, checks, epoch
        self.on_checkpoint, self.state, self.stepper = on_checkpoint, stepper.state, stepper
        state = stepper.state
        self.accelerator, self.progress = state.accelerator, state.progress
        self.machine = this_machine(self.accelerator.device, self.accelerator.num_processes)
        self.clock = time.perf_counter()  # from when on time counts as that of steps
        self.saving: tuple[int, Future[Path]] | None = None  # a step and its checkpoint, which is being written
        self.data_seconds = 0.0
        self.step_seconds = 0.0  # of the steps that were timed
        self.check_times: list[CheckTime] = []
        self.first_micro_batches: list[Batch] = []  # which were taken to be timed
        self.logged_at = (self.progress.tokens, self.progress.seconds, self.data_seconds)

    @property
    def plan(self) -> TrainingPlan:
        """The plan from here on."""
        return self.stepper.plan

    def time_steps(self, minutes: float) -> None:
        """Time the first step, as `timing.time_first_step` does; UserError if too few fit the run's time."""
        taken = self._take()
        self.first_micro_batches, self.step_seconds = time_first_step(
            self.stepper, taken, self.run.auto_find_batch_size
        )
        require_steps(minutes, Steps(self.step_seconds, closing_seconds=self._closing_seconds), spent_seconds())

    def _take(self) -> list[Batch]:
        """Return the next step's rows of this process, in micro-batches."""
        return [self.state.batches.take(self.plan.rows) for _ in range(self.plan.micro_batches)]

    def _decide_steps(self) -> None:
        """Turn the run's time into a number of steps, once those and the checks are timed, and record it."""
        if self.plan.minutes is None:
            return
        steps = Steps(self.step_seconds, self.check_times, self._closing_seconds)
        fitting = max(MIN_STEPS, steps.within(60 * self.plan.minutes - spent_seconds()))
        self.stepper.plan = self.plan.with_steps(from_main_process(fitting), self.run)
        self.folder.record_run(self.plan)
        until = time_of_day(steps.seconds_of(self.plan.max_steps))
        logger.info(
            "max_minutes=%g: %s steps of %s; the run ends at about %s",
            *(self.run.max_minutes, f"{self.plan.max_steps:,}", duration(self.step_seconds), until),
        )

    def _begin(self) -> None:
        """Say what the run is about to do, and begin to look for advice."""
        epoch, processes, epochs = self.epoch, self.accelerator.num_processes, None
        if epoch is not None:
            logger.info(epoch.describe(self.plan, processes))
            epochs = epoch.times_seen(self.plan, processes)
        is_timed = self.step_seconds > 0  # so that the end has been said
        self.forecast = None if is_timed else Forecast(self.progress.step, self.plan.max_steps)
        tokens, parameters = epoch and epoch.tokens, self.state.model.num_parameters()
        facts = RunFacts(self.run, self.plan.max_steps, parameters, tokens, epochs, bits_of_base(self.run))
        self.adviser = Adviser(facts, read_metrics(self.folder.path) if self.folder.is_writer else ())

    def _look_ahead(self) -> None:
        """Say when the run ends, as soon as that can be told."""
        if self.forecast and (end := self.forecast.observe(self.progress, self.check_times, self._closing_seconds)):
            logger.info(end)

    @property
    def _closing_seconds(self) -> float:
        return closing_seconds(self.state.model.num_parameters())

    def run_steps(self, received_signal: Callable[[], int]) -> int:
        """Take steps until the last one, or until a signal comes before that; return the signal, or 0.

        When this ends, however it does, no checkpoint is still being written.
        """
        try:
            return self._take_steps(received_signal)
        finally:
            self._end_saving()

    def _take_steps(self, received_signal: Callable[[], int]) -> int:
        """Take the steps of `run_steps`.

        A step is read when the next one is queued, so that the device never waits for the host; but at once where
        something is to be measured or saved, which belongs to its weights.
        """
        progress = self.progress
        first = self._run_due_checks() if progress.step == 0 else {}
        self._decide_steps()
        self._begin()
        self._log(first)
        last, queued, signal = self.plan.max_steps, deque[_QueuedStep](), 0
        with self._progress_bar() as bar, profiled(self.run.profile, self.folder) as next_profiled_step:
            self.clock = time.perf_counter()
            while progress.step < last:
                queued.append(self._queue_step(progress.step + len(queued), received_signal))
                next_profiled_step()
                is_awaited = queued[-1].is_awaited
                while len(queued) > (0 if is_awaited else 1):
                    signal = self._finish(queued.popleft(), bar) or signal
                    is_awaited = is_awaited or signal > 0
                self._end_saving(wait=False)
                if is_awaited and (self._is_due(self.run.save_steps) or signal):
                    self._save_checkpoint()
                if signal and progress.step < last:
                    return signal
                if is_awaited:
                    self.clock = time.perf_counter()  # the time of checks and checkpoints is not that of steps
        return 0

    def _finish(self, queued: "_QueuedStep", bar: "tqdm[NoReturn]") -> int:
        """Wait for a step, and log and check what is due after it; return the signal that asked to stop, or 0."""
        step, progress = queued.taken.read(), self.progress
        now = time.perf_counter()
        progress.seconds += now - self.clock
        progress.step, self.clock = progress.step + 1, now
        progress.tokens += queued.tokens
        if progress.step == 1:
            logger.info("first training step done %.1f s after the start", spent_seconds())
        self._look_ahead()
        self._count_skipped(step)
        measured = self._measure(step, queued.learning_rate) if self._is_due(self.run.logging_steps) else {}
        self._log(measured | (self._run_due_checks() if queued.is_awaited else {}))
        bar.update()
        if measured:
            share = f", MFU {measured['mfu']:.1%}" if "mfu" in measured else ""
            bar.set_postfix_str(f"loss {step.loss:.3f}, {measured['tokens_per_second']:,.0f} tok/s{share}")
        return step.stop_signal

    def _progress_bar(self) -> "tqdm[NoReturn]":
        """Return a bar of the steps that fits its terminal; a file has lines of `LINE_LENGTH`."""
        columns = None if sys.stderr.isatty() else LINE_LENGTH
        return tqdm(
            total=self.plan.max_steps,
            initial=self.progress.step,
            unit="step",
            ncols=columns,
            dynamic_ncols=columns is None,
            disable=not self.folder.is_writer,
        )

    def _queue_step(self, steps_before: int, received_signal: Callable[[], int]) -> "_QueuedStep":
        """Read the rows of the step that follows this many others, and queue it on the device."""
        began = time.perf_counter()
        run, plan = self.run, self.plan
        micro_batches = self.first_micro_batches or self._take()
        self.first_micro_batches = []
        self.data_seconds += time.perf_counter() - began
        warmup_steps = run.warmup_steps if plan.warmup_steps is None else plan.warmup_steps
        ratios = run.min_lr_ratio, run.lr_decay_ratio
        factor = learning_rate_factor(run.lr_scheduler_type, steps_before, plan.max_steps, warmup_steps, *ratios)
        self.state.optimizer.set_learning_rate(run.learning_rate * factor)
        decay_factor = weight_decay_factor(run.weight_decay_scheduler_type, steps_before, plan.max_steps)
        self.state.optimizer.scale_weight_decay(decay_factor)
        taken = self.stepper.take(micro_batches, received_signal())
        if self.plan != plan:  # memory ran out
            self.folder.record_run(self.plan)
        tokens = sum(batch["input_ids"].numel() for batch in micro_batches) * self.accelerator.num_processes
        step, every = steps_before + 1, [check.every_steps for check in self.checks]
        is_awaited = (
            taken.may_stop or step == plan.max_steps or any(step % steps == 0 for steps in (run.save_steps, *every))
        )
        return _QueuedStep(taken, tokens, run.learning_rate * factor, is_awaited)

    def _count_skipped(self, step: Step) -> None:
        """Count a step that left the weights unchanged; raise UserError after too many in a row."""
        progress, limit = self.progress, self.run.max_bad_steps
        if step.skip_reason is None:
            progress.skipped_in_a_row = 0
            return
        progress.skipped_steps += 1
        progress.skipped_in_a_row += 1
        logger.warning("step %d is skipped: %s", progress.step, step.skip_reason)
        if progress.skipped_in_a_row >= limit:
            raise UserError(
                f"none of the last {limit} steps could be used: {step.skip_reason}. Try a lower learning_rate and "
                f"resume from a checkpoint in {self.folder.checkpoints} (--resume_from_checkpoint latest)"
            )

    def _measure(self, step: Step, learning_rate: float) -> dict[str, float]:
        """Return a step's part of `metrics.jsonl`, with speeds since the last line."""
        progress = self.progress
        now = (progress.tokens, progress.seconds, self.data_seconds)
        tokens, seconds, waited = (new - old for new, old in zip(now, self.logged_at, strict=True))
        self.logged_at = now
        share_of_peak = Workload(self.run, self.state.model.config, self.machine).mfu(tokens / seconds)
        return {
            "loss": step.loss,
            **step.metrics,
            "learning_rate": learning_rate,
            "grad_norm": step.grad_norm,
            "skipped_steps": progress.skipped_steps,
            "tokens_per_second": tokens / seconds,
            **({} if share_of_peak is None else {"mfu": share_of_peak}),
            "data_wait_share": waited / seconds,
            "peak_memory_bytes": peak_memory_bytes(self.accelerator.device),
        }

    def _run_due_checks(self) -> dict[str, float]:
        results: dict[str, float] = {}
        for check in self.checks:
            if self.progress.step == 0 or self._is_due(check.every_steps):
                began = time.perf_counter()
                with evaluating(self.state.objective):
                    results |= check(self.progress.step)
                if self.progress.step == 0:
                    self.check_times.append(CheckTime(time.perf_counter() - began, check.every_steps))
        return results

    def _is_due(self, every_steps: int) -> bool:
        return self.progress.step % every_steps == 0 or self.progress.step == self.plan.max_steps

    def _log(self, measured: Mapping[str, float]) -> None:
        if measured:
            line = {**self.progress.position, **measured}
            self.folder.append_metrics(line)
            self.accelerator.log(line, step=self.progress.step)
            if self.folder.is_writer:
                for advice in self.adviser.observe(line):
                    logger.warning("advice: %s", advice)

    def _save_checkpoint(self) -> None:
        """Begin to save, when the last checkpoint is written."""
        self._end_saving()
        self.saving = self.progress.step, self.state.save(self.folder.checkpoints, self.run.save_total_limit)
        self._end_saving(wait=False)

    def _end_saving(self, wait: bool = True) -> None:
        """Tell of the checkpoint that is being written, when it is; `wait` for that or leave it for later."""
        if self.saving is None or not (wait or self.saving[1].done()):
            return
        (step, written), self.saving = self.saving, None
        try:
            self.on_checkpoint(written.result())
        except OSError as error:
            logger.error("no checkpoint of step %d, but the earlier ones are complete: %s", step, error)
