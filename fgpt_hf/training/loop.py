"""Train: one loop for every stage, which knows an objective, batches and checks, but no corpus and no metric."""

import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn, Protocol

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from fgpt_hf.config.runs import Run
from fgpt_hf.config.schedules import learning_rate_factor, weight_decay_factor
from fgpt_hf.data.batches import Batches
from fgpt_hf.errors import UserError
from fgpt_hf.files import atomic_directory
from fgpt_hf.losses.objectives import Batch, Objective
from fgpt_hf.model.io import non_finite_weights, save_model
from fgpt_hf.runtime.attention import resolve_attn_implementation, set_attention
from fgpt_hf.runtime.distributed import all_reduce_sum, evaluating, shard
from fgpt_hf.runtime.duration import (
    MIN_STEPS,
    CheckTime,
    Steps,
    closing_seconds,
    duration,
    require_steps,
    time_of_day,
)
from fgpt_hf.runtime.estimate import mfu
from fgpt_hf.runtime.hardware import peak_memory_bytes, this_machine
from fgpt_hf.runtime.plan import TrainingPlan
from fgpt_hf.runtime.signals import exit_code_of, stop_signals
from fgpt_hf.training.advice import Adviser, Facts, bits_of_base
from fgpt_hf.training.checkpoints import Progress, TrainingState, step_of, too_few_steps
from fgpt_hf.training.optim import build_optimizer, describe_groups
from fgpt_hf.training.outlook import Epoch, Forecast
from fgpt_hf.training.run_folder import RunFolder, read_metrics
from fgpt_hf.training.step import Step, Stepper
from fgpt_hf.training.timing import alike, spent_seconds, time_first_step

logger = logging.getLogger(__name__)

LINE_LENGTH = 79  # of the progress bar in a file


class Check(Protocol):
    """A measurement before the first step, every `every_steps` steps and after the last one."""

    @property
    def every_steps(self) -> int: ...

    def __call__(self, step: int) -> Mapping[str, float]:
        """Return what to log, by name. Every process calls it."""


class Outcome(NamedTuple):
    """How far a run came, and the signal that made it stop before its last step, or 0."""

    progress: Progress
    stopped_by: int = 0

    @property
    def exit_code(self) -> int:
        """The code for the process to exit with: 0 for a finished run, 143 for one that SIGTERM stopped."""
        return exit_code_of(self.stopped_by) if self.stopped_by else 0


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """Trains the model of an objective as a run describes, and leaves it in the run's folder.

    Attributes:
        accelerator: the processes, the device and the precision.
        run: the options.
        plan: what the run left open.
        folder: where metrics, checkpoints and the model are written.
        objective: the model and its loss.
        tokenizer: saved beside the model.
        batches: the training data of this process.
        checks: measurements to take along the way.
        epoch: the size of the training data, if it is known.
        on_checkpoint: called with the path of every checkpoint that was written.

    Example:
        >>> from tempfile import mkdtemp
        >>> import numpy as np
        >>> from fgpt_hf import FGPTConfig, FGPTForCausalLM
        >>> from fgpt_hf.data.batches import RowsInMemory, ShuffledRows
        >>> from fgpt_hf.losses.objectives import LanguageModelObjective
        >>> from fgpt_hf.tokenizer.tokenizer import build_tokenizer
        >>> run = Run(output_dir=f"{mkdtemp()}/run", bf16=False)
        >>> model = FGPTForCausalLM(FGPTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
        >>> trainer = Trainer(
        ...     accelerator=Accelerator(cpu=True),
        ...     run=run,
        ...     plan=TrainingPlan(max_steps=2, rows=4, micro_batches=1),
        ...     folder=RunFolder(run),
        ...     objective=LanguageModelObjective(model),
        ...     tokenizer=build_tokenizer(),
        ...     batches=ShuffledRows(RowsInMemory(np.full((8, 16), 5, dtype=np.uint16)), seed=0),
        ... )
        >>> trainer.fit().progress.tokens
        128
    """

    accelerator: Accelerator
    run: Run
    plan: TrainingPlan
    folder: RunFolder
    objective: Objective
    tokenizer: PreTrainedTokenizerBase
    batches: Batches
    checks: Sequence[Check] = ()
    epoch: Epoch | None = None
    on_checkpoint: Callable[[Path], None] = lambda checkpoint: None

    def fit(self) -> Outcome:
        """Train up to the plan's last step and save the model; return how far the run came.

        The losses of a step are summed over micro-batches and processes and divided by their number, so the result
        does not depend on how the rows of a step are divided. SIGTERM and SIGINT let the current step end, save a
        checkpoint and return early.

        Raises:
            UserError: the checkpoint to resume from cannot be used, or too many steps in a row were unusable.
            OSError: the model could not be written.
        """
        forward, state = self._start()
        loop = _Loop(self, forward, state)
        if self.plan.minutes is not None:
            loop.time_steps(self.plan.minutes)
        self._begin(state)
        with stop_signals() as received_signal:
            stopped_by = loop.run_steps(received_signal)
        progress = state.progress
        if stopped_by:
            logger.info("stopped after step %d: the same command goes on from there", progress.step)
        else:
            self._save_model(state)
            memory = peak_memory_bytes(self.accelerator.device) / 2**30
            logger.info("trained for %s s; peak memory %.2f GiB", f"{progress.seconds:,.0f}", memory)
        self.accelerator.wait_for_everyone()
        return Outcome(progress, stopped_by)

    def _start(self) -> tuple[nn.Module, TrainingState]:
        """Return the objective as the processes share it, and the state to start or resume from."""
        run, accelerator = self.run, self.accelerator
        model = self.objective.model.train()
        dropout = getattr(model.config, "attention_dropout", 0.0)
        set_attention(model, resolve_attn_implementation(run, accelerator, dropout))
        if run.gradient_checkpointing:
            model.activation_checkpointing_enable()
        if run.torch_compile:
            model.get_decoder().compile()  # in place, so that names and classes do not change
        forward = shard(self.objective, accelerator) if run.fsdp else accelerator.prepare_model(self.objective)
        if run.print_groups:
            logger.info("parameters by optimizer and weight decay:\n%s", describe_groups(model, run.optim))
        optimizer = build_optimizer(model, run)
        state = TrainingState(accelerator, self.objective, self.tokenizer, optimizer, self.batches, Progress())
        if checkpoint := self._checkpoint():
            assert self.plan.minutes is None, "a run that goes on has decided its steps: RunFolder.decided"
            if self.plan.max_steps < step_of(checkpoint):
                raise too_few_steps(self.plan.max_steps, step_of(checkpoint))
            state.restore(checkpoint)
        self._require_finite_weights(model)
        return forward, state

    def _begin(self, state: TrainingState) -> None:
        """Begin to write: the record in the run's folder, and the options for a tracker."""
        self.folder.begin(self.plan, state.progress.step if self._checkpoint() else None)
        if self.run.report_to != "none":
            options = asdict(self.plan.fill_in(self.run))
            given = {name: value for name, value in options.items() if value is not None}
            self.accelerator.init_trackers(self.run.preset, given)

    def _checkpoint(self) -> Path | None:
        """Return the checkpoint to continue from, which the main process finds."""
        found: list[Path | None] = [self.folder.checkpoint if self.folder.is_writer else None]
        broadcast_object_list(found)
        return found[0]

    def _require_finite_weights(self, model: nn.Module) -> None:
        """Raise UserError on all processes if a weight of one of them is no number: every step would be skipped."""
        broken = non_finite_weights(model)
        if any(all_reduce_sum(self.accelerator, float(len(broken)))):
            start = self.folder.checkpoint or "the model"
            example = f", such as {broken[0]}" if broken else ""
            raise UserError(f"weights of {start} hold NaN or infinite values{example}: take an earlier checkpoint")

    def _save_model(self, state: TrainingState) -> None:
        weights = state.weights()
        if self.accelerator.is_main_process:
            with atomic_directory(self.folder.model) as new_folder:
                save_model(state.model, self.tokenizer, new_folder, weights)


class _Loop:
    """The steps of a run, with what is logged, checked and saved along the way."""

    def __init__(self, trainer: Trainer, forward: nn.Module, state: TrainingState) -> None:
        self.trainer, self.run, self.folder = trainer, trainer.run, trainer.folder
        self.state, self.stepper = state, Stepper(forward, state, trainer.plan, trainer.run.max_grad_norm)
        self.accelerator, self.progress = state.accelerator, state.progress
        self.machine = this_machine(self.accelerator.device, self.accelerator.num_processes)
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
        self.stepper.plan = self.plan.with_steps(alike(fitting), self.run)
        self.folder.record_run(self.plan)
        until = time_of_day(steps.seconds_of(self.plan.max_steps))
        logger.info(
            "max_minutes=%g: %s steps of %s; the run ends at about %s",
            *(self.run.max_minutes, f"{self.plan.max_steps:,}", duration(self.step_seconds), until),
        )

    def _begin(self) -> None:
        """Say what the run is about to do, and begin to look for advice."""
        epoch, processes, epochs = self.trainer.epoch, self.accelerator.num_processes, None
        if epoch is not None:
            logger.info(epoch.describe(self.plan, processes))
            epochs = epoch.times_seen(self.plan, processes)
        is_timed = self.step_seconds > 0  # so that the end has been said
        self.forecast = None if is_timed else Forecast(self.progress.step, self.plan.max_steps)
        tokens, parameters = epoch and epoch.tokens, self.state.model.num_parameters()
        facts = Facts(self.run, self.plan.max_steps, parameters, tokens, epochs, bits_of_base(self.run))
        self.adviser = Adviser(facts, read_metrics(self.folder.path) if self.folder.is_writer else ())

    def _look_ahead(self) -> None:
        """Say when the run ends, as soon as that can be told."""
        if self.forecast and (end := self.forecast.observe(self.progress, self.check_times, self._closing_seconds)):
            logger.info(end)

    @property
    def _closing_seconds(self) -> float:
        return closing_seconds(self.state.model.num_parameters())

    def run_steps(self, received_signal: Callable[[], int]) -> int:
        """Take steps until the last one, or until a signal comes before that; return the signal, or 0."""
        progress = self.progress
        first = self._run_due_checks() if progress.step == 0 else {}
        self._decide_steps()
        self._begin()
        self._log(first)
        last = self.plan.max_steps
        with self._progress_bar() as bar:
            while progress.step < last:
                step = self._next_step(received_signal)
                self._look_ahead()
                self._count_skipped(step)
                measured = self._measure(step) if self._is_due(self.run.logging_steps) else {}
                self._log(measured | self._run_due_checks())
                bar.update()
                if measured:
                    share = f", MFU {measured['mfu']:.1%}" if "mfu" in measured else ""
                    bar.set_postfix_str(f"loss {step.loss:.3f}, {measured['tokens_per_second']:,.0f} tok/s{share}")
                if self._is_due(self.run.save_steps) or step.stop_signal:
                    self._save_checkpoint()
                if step.stop_signal and progress.step < last:
                    return step.stop_signal
        return 0

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

    def _next_step(self, received_signal: Callable[[], int]) -> Step:
        """Read the rows of a step, train on them, and add up the time of both."""
        began = time.perf_counter()
        run, progress, plan = self.run, self.progress, self.plan
        micro_batches = self.first_micro_batches or self._take()
        self.first_micro_batches = []
        self.data_seconds += time.perf_counter() - began
        warmup_steps = run.warmup_steps if plan.warmup_steps is None else plan.warmup_steps
        ratios = run.min_lr_ratio, run.lr_decay_ratio
        factor = learning_rate_factor(run.lr_scheduler_type, progress.step, plan.max_steps, warmup_steps, *ratios)
        self.state.optimizer.set_learning_rate(run.learning_rate * factor)
        decay_factor = weight_decay_factor(run.weight_decay_scheduler_type, progress.step, plan.max_steps)
        self.state.optimizer.scale_weight_decay(decay_factor)
        step = self.stepper.take(micro_batches, received_signal())
        if self.plan != plan:  # memory ran out
            self.folder.record_run(self.plan)
        if progress.step == 0:
            logger.info("first training step done %.1f s after the start", spent_seconds())
        progress.step += 1
        progress.tokens += sum(batch["input_ids"].numel() for batch in micro_batches) * self.accelerator.num_processes
        progress.seconds += time.perf_counter() - began
        return step

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

    def _measure(self, step: Step) -> dict[str, float]:
        """Return a step's part of `metrics.jsonl`, with speeds since the last line."""
        progress = self.progress
        now = (progress.tokens, progress.seconds, self.data_seconds)
        tokens, seconds, waited = (new - old for new, old in zip(now, self.logged_at, strict=True))
        self.logged_at = now
        share_of_peak = mfu(self.run, self.state.model.config, tokens / seconds, self.machine)
        return {
            "loss": step.loss,
            **step.metrics,
            "learning_rate": self.state.optimizer.param_groups[0]["lr"],
            "grad_norm": step.grad_norm,
            "skipped_steps": progress.skipped_steps,
            "tokens_per_second": tokens / seconds,
            **({} if share_of_peak is None else {"mfu": share_of_peak}),
            "data_wait_share": waited / seconds,
            "peak_memory_bytes": peak_memory_bytes(self.accelerator.device),
        }

    def _run_due_checks(self) -> dict[str, float]:
        results: dict[str, float] = {}
        for check in self.trainer.checks:
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
        try:
            self.trainer.on_checkpoint(self.state.save(self.folder.checkpoints, self.run.save_total_limit))
        except OSError as error:
            step = self.progress.step
            logger.error("no checkpoint of step %d, but the earlier ones are complete: %s", step, error)
