"""Train: one loop for every stage, which knows an objective, batches and checks, but no corpus and no metric."""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, send_to_device
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from fgpt_hf.config.runs import Run
from fgpt_hf.data.batches import Batches
from fgpt_hf.errors import UserError
from fgpt_hf.files import atomic_directory
from fgpt_hf.losses.objectives import Objective
from fgpt_hf.model.io import non_finite_weights, save_model
from fgpt_hf.runtime.distributed import (
    all_reduce_sum,
    evaluating,
    resolve_attn_implementation,
    shard,
    sync_gradients,
)
from fgpt_hf.runtime.estimate import mfu
from fgpt_hf.runtime.hardware import peak_memory_bytes, this_machine
from fgpt_hf.runtime.plan import TrainingPlan, split_on_oom
from fgpt_hf.runtime.signals import exit_code_of, stop_signals
from fgpt_hf.training.checkpoints import Progress, TrainingState, step_of, too_few_steps
from fgpt_hf.training.optim import build_optimizer, learning_rate_factor
from fgpt_hf.training.run_folder import RunFolder
from fgpt_hf.workers import STOP_SIGNALS

logger = logging.getLogger(__name__)


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
        with stop_signals() as received_signal:
            stopped_by = _Loop(self, forward, state).run_steps(received_signal)
        progress = state.progress
        if stopped_by:
            logger.info("stopped after step %d: continue with --resume_from_checkpoint latest", progress.step)
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
        model.set_attn_implementation(resolve_attn_implementation(run, accelerator))
        if run.gradient_checkpointing:
            model.activation_checkpointing_enable()
        if run.torch_compile:
            model.get_decoder().compile()  # in place, so that names and classes do not change
        forward = shard(self.objective, accelerator) if run.fsdp else accelerator.prepare_model(self.objective)
        optimizer = build_optimizer(model, run)
        state = TrainingState(accelerator, self.objective, self.tokenizer, optimizer, self.batches, Progress())
        if checkpoint := self._checkpoint():
            if self.plan.max_steps < step_of(checkpoint):
                raise too_few_steps(self.plan.max_steps, step_of(checkpoint))
            state.restore(checkpoint)
        self._require_finite_weights(model)
        self.folder.begin(self.plan, state.progress.step if checkpoint else None)
        if run.report_to != "none":
            options = asdict(self.plan.fill_in(run))
            accelerator.init_trackers(run.preset, {name: value for name, value in options.items() if value is not None})
        return forward, state

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


class _Step(NamedTuple):
    """The outcome of one step.

    Attributes:
        loss: the mean loss.
        metrics: the means of the objective's other metrics, by name.
        grad_norm: the norm of the gradient before clipping.
        num_items: the number of loss terms.
        stop_signal: the signal that asked one of the processes to stop, or 0.
    """

    loss: float
    metrics: Mapping[str, float]
    grad_norm: float
    num_items: float
    stop_signal: int

    @property
    def skip_reason(self) -> str | None:
        """Why the weights were left unchanged; None if they were not."""
        if self.num_items == 0:
            return "the batch has no labels"
        return None if math.isfinite(self.grad_norm) else f"the gradient is not finite (norm {self.grad_norm})"


class _Loop:
    """The steps of a run, with what is logged, checked and saved along the way."""

    def __init__(self, trainer: Trainer, forward: nn.Module, state: TrainingState) -> None:
        self.trainer, self.run, self.folder = trainer, trainer.run, trainer.folder
        self.forward, self.state, self.plan = forward, state, trainer.plan
        self.accelerator, self.progress = state.accelerator, state.progress
        self.optimizer = state.accelerator.prepare_optimizer(state.optimizer)  # the same one, with the loss scaler
        self.machine = this_machine(self.accelerator.device, self.accelerator.num_processes)
        self.data_seconds = 0.0
        self.logged_at = (self.progress.tokens, self.progress.seconds, self.data_seconds)

    def run_steps(self, received_signal: Callable[[], int]) -> int:
        """Take steps until the last one, or until a signal comes before that; return the signal, or 0."""
        progress, last = self.progress, self.plan.max_steps
        with tqdm(total=last, initial=progress.step, unit="step", disable=not self.folder.is_writer) as bar:
            if progress.step == 0:
                self._log(self._run_due_checks())
            while progress.step < last:
                step = self._next_step(received_signal)
                self._count_skipped(step)
                measured = self._measure(step) if self._is_due(self.run.logging_steps) else {}
                self._log(measured | self._run_due_checks())
                bar.update()
                if measured:
                    share = f", MFU {measured['mfu']:.1%}" if "mfu" in measured else ""
                    bar.set_postfix_str(f"loss {step.loss:.3f}, {measured['tokens_per_second']:,.0f} tokens/s{share}")
                if self._is_due(self.run.save_steps) or step.stop_signal:
                    self._save_checkpoint()
                if step.stop_signal and progress.step < last:
                    return step.stop_signal
        return 0

    def _next_step(self, received_signal: Callable[[], int]) -> _Step:
        """Read the rows of a step, train on them, and add up the time of both."""
        began = time.perf_counter()
        run, progress = self.run, self.progress
        micro_batches = [self.state.batches.take(self.plan.rows) for _ in range(self.plan.micro_batches)]
        self.data_seconds += time.perf_counter() - began
        factor = learning_rate_factor(
            run.lr_scheduler_type, progress.step, self.plan.max_steps, run.warmup_steps, run.min_lr_ratio
        )
        self.state.optimizer.set_learning_rate(run.learning_rate * factor)
        step = self._train(micro_batches, received_signal())
        if progress.step == 0:
            since_start = time.time() - psutil.Process().create_time()
            logger.info("first training step done %.1f s after the start", since_start)
        progress.step += 1
        progress.tokens += sum(batch["input_ids"].numel() for batch in micro_batches) * self.accelerator.num_processes
        progress.seconds += time.perf_counter() - began
        return step

    def _train(self, micro_batches: Sequence[Mapping[str, Tensor]], received_signal: int) -> _Step:
        """Move the weights once, by the mean loss over all micro-batches and processes."""
        accelerator, objective = self.accelerator, self.state.objective
        num_items, *counts = all_reduce_sum(
            accelerator,
            sum(float(objective.num_items(batch)) for batch in micro_batches),
            *(float(received_signal == number) for number in STOP_SIGNALS),
        )
        stop_signal = next((number for number, count in zip(STOP_SIGNALS, counts, strict=True) if count), 0)
        means = self._accumulate_gradients(micro_batches, max(num_items, 1.0))
        while means is None:  # out of memory
            self.optimizer.zero_grad()
            micro_batches, self.plan = split_on_oom(micro_batches, self.plan, accelerator)
            self.folder.record_run(self.plan)
            means = self._accumulate_gradients(micro_batches, max(num_items, 1.0))
        grad_norm = accelerator.clip_grad_norm_(self.forward.parameters(), self.run.max_grad_norm)
        loss, *others = all_reduce_sum(accelerator, *means.tolist())
        metrics = dict(zip(objective.metric_names, others, strict=True))
        step = _Step(loss, metrics, float(grad_norm), num_items, stop_signal)
        scaler = accelerator.scaler
        if step.skip_reason is None or (scaler is not None and num_items > 0):
            self.optimizer.step()  # with a scaler, which skips non-finite gradients by itself, and adapts to them
        elif scaler is not None:
            scaler.update()  # forget that these gradients were unscaled
        self.optimizer.zero_grad()
        return step

    def _accumulate_gradients(self, micro_batches: Sequence[Mapping[str, Tensor]], num_items: float) -> Tensor | None:
        """Add up this process's gradients; return its losses and metrics over `num_items`, or None if out of memory."""
        accelerator = self.accelerator
        means = torch.zeros(1 + len(self.state.objective.metric_names), device=accelerator.device)
        try:
            for number, batch in enumerate(micro_batches, start=1):
                with sync_gradients(self.forward, accelerator, number == len(micro_batches)), accelerator.autocast():
                    parts = self.forward(send_to_device(batch, accelerator.device)).reshape(-1) / num_items
                    # Gradients are averaged over the processes, but their sum is needed.
                    accelerator.backward(parts[0] * accelerator.num_processes)
                means += parts.detach()
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            return None  # the failed pass's tensors are freed with its traceback
        return means

    def _count_skipped(self, step: _Step) -> None:
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

    def _measure(self, step: _Step) -> dict[str, float]:
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
                with evaluating(self.state.objective):
                    results |= check(self.progress.step)
        return results

    def _is_due(self, every_steps: int) -> bool:
        return self.progress.step % every_steps == 0 or self.progress.step == self.plan.max_steps

    def _log(self, measured: Mapping[str, float]) -> None:
        if measured:
            line = {**self.progress.position, **measured}
            self.folder.append_metrics(line)
            self.accelerator.log(line, step=self.progress.step)

    def _save_checkpoint(self) -> None:
        try:
            self.trainer.on_checkpoint(self.state.save(self.folder.checkpoints, self.run.save_total_limit))
        except OSError as error:
            step = self.progress.step
            logger.error("no checkpoint of step %d, but the earlier ones are complete: %s", step, error)
