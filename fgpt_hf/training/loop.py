"""The one loop: it is handed a model, an objective, batches and checks, and knows no corpus and no metric."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from fgpt_hf.config.runs import Run
from fgpt_hf.data.batches import Batches
from fgpt_hf.errors import UserError
from fgpt_hf.files import atomic_directory
from fgpt_hf.losses.objectives import Objective
from fgpt_hf.model.io import save_model
from fgpt_hf.runtime.distributed import (
    all_reduce_sum,
    evaluating,
    resolve_attn_implementation,
    shard,
    stop_signals,
    sync_gradients,
)
from fgpt_hf.runtime.estimate import mfu
from fgpt_hf.runtime.hardware import peak_memory_bytes, this_machine
from fgpt_hf.runtime.plan import split_on_oom
from fgpt_hf.training.checkpoints import Progress, TrainingState, checkpoint_to_resume
from fgpt_hf.training.optim import build_optimizer, learning_rate_factor
from fgpt_hf.training.run_folder import RunFolder


class Check(NamedTuple):
    """Something to look at before the first step, every so many and after the last: `run(step)` says what to log."""

    every_steps: int
    run: Callable[[int], dict[str, float]]


def fit(
    accelerator: Accelerator,
    run: Run,
    folder: RunFolder,
    objective: Objective,
    tokenizer: PreTrainedTokenizerBase,
    batches: Batches,
    checks: Sequence[Check] = (),
    on_checkpoint: Callable[[Path], None] = lambda checkpoint: None,
) -> TrainingState:
    """Train `objective.model` up to `run.max_steps` and leave it in `folder.model`.

    The losses of a step are summed over micro-batches and processes and divided by their total weight, so it does not
    matter how its rows are divided. `on_checkpoint` is called with every checkpoint that was written. SIGTERM and
    SIGINT let the step end, save a checkpoint and return early.

    Raises:
        UserError: nothing to resume from; no finite gradient for `run.max_bad_steps` steps in a row.
        OSError: the model could not be written.
    """
    forward, state = _prepare(accelerator, run, objective, tokenizer, batches)
    if run.resume_from_checkpoint:
        state.restore(checkpoint_to_resume(run, folder.checkpoints, accelerator.print))
        folder.forget_after(state.progress.step)
    folder.begin()
    if run.report_to != "none":
        accelerator.init_trackers(run.preset, {name: value for name, value in asdict(run).items() if value is not None})
    with stop_signals() as stop_requested:
        _Loop(run, folder, forward, state, checks, on_checkpoint).go(stop_requested)
    if state.progress.step < run.max_steps:
        accelerator.print(f"stopped after step {state.progress.step}: go on with --resume_from_checkpoint latest")
    else:
        weights = state.weights()
        if accelerator.is_main_process:
            with atomic_directory(folder.model) as new_folder:
                save_model(state.model, tokenizer, new_folder, weights)
        memory = peak_memory_bytes(accelerator.device) / 2**30
        accelerator.print(f"done in {state.progress.seconds:,.0f} s of training; peak memory {memory:.2f} GiB")
    accelerator.wait_for_everyone()
    return state


def _prepare(
    accelerator: Accelerator,
    run: Run,
    objective: Objective,
    tokenizer: PreTrainedTokenizerBase,
    batches: Batches,
) -> tuple[nn.Module, TrainingState]:
    """The objective as the processes share it, and the state of the run at its beginning."""
    model = objective.model.train()
    model.set_attn_implementation(resolve_attn_implementation(run, accelerator))
    if run.gradient_checkpointing:
        model.activation_checkpointing_enable()
    if run.torch_compile:
        model.get_decoder().compile()  # in place, so that names and classes stay as they are
    forward = shard(objective, accelerator) if run.fsdp else accelerator.prepare_model(objective)
    optimizer = build_optimizer(model, run)
    return forward, TrainingState(accelerator, objective, tokenizer, optimizer, batches, Progress())


class _Step(NamedTuple):
    """What one step gave: the means of its losses and of what its objective observed, the norm of its gradient, and
    whether the run was asked to stop."""

    loss: float
    observed: Mapping[str, float]
    grad_norm: float
    weight: float
    stop: bool

    @property
    def flaw(self) -> str | None:
        """Why the weights were left as they were, if they were."""
        if self.weight == 0:
            return "no token of it is scored"
        return None if math.isfinite(self.grad_norm) else f"its gradient is not finite (norm {self.grad_norm})"


class _Loop:
    """The steps from where a run stands to where it ends, and what is logged, checked and saved on the way."""

    def __init__(
        self,
        run: Run,
        folder: RunFolder,
        forward: nn.Module,
        state: TrainingState,
        checks: Sequence[Check],
        on_checkpoint: Callable[[Path], None],
    ) -> None:
        self.run, self.folder, self.forward, self.state = run, folder, forward, state
        self.checks, self.on_checkpoint = checks, on_checkpoint
        self.accelerator, self.progress = state.accelerator, state.progress
        self.optimizer = state.accelerator.prepare_optimizer(state.optimizer)  # the same one, with the loss scaler
        self.machine = this_machine(self.accelerator.device, self.accelerator.num_processes)
        self.data_seconds = 0.0
        self.logged_at = (self.progress.tokens, self.progress.seconds, self.data_seconds)

    def go(self, stop_requested: Callable[[], bool]) -> None:
        run, progress = self.run, self.progress
        with tqdm(total=run.max_steps, initial=progress.step, unit="step", disable=not self.folder.is_writer) as bar:
            if progress.step == 0:
                self._write(self._checked())
            while progress.step < run.max_steps:
                step = self._next_step(stop_requested)
                self._account_for(step)
                measured = self._measured(step) if self._is_due(run.logging_steps) else {}
                self._write(measured | self._checked())
                bar.update()
                if measured:
                    share = f", MFU {measured['mfu']:.1%}" if "mfu" in measured else ""
                    bar.set_postfix_str(f"loss {step.loss:.3f}, {measured['tokens_per_second']:,.0f} tokens/s{share}")
                if self._is_due(run.save_steps) or step.stop:
                    self._save()
                if step.stop:
                    return

    def _next_step(self, stop_requested: Callable[[], bool]) -> _Step:
        """Take the rows of a step, train on them, and add up the time of both."""
        began = time.perf_counter()
        run, progress = self.run, self.progress
        micro_batches = [
            self.state.batches.take(run.per_device_train_batch_size) for _ in range(run.gradient_accumulation_steps)
        ]
        self.data_seconds += time.perf_counter() - began
        factor = learning_rate_factor(
            run.lr_scheduler_type, progress.step, run.max_steps, run.warmup_steps, run.min_lr_ratio
        )
        self.state.optimizer.set_learning_rate(run.learning_rate * factor)
        step = self._train(micro_batches, stop_requested())
        if progress.step == 0:
            since_start = time.time() - psutil.Process().create_time()
            self.accelerator.print(f"first training step done {since_start:.1f} s after the start")
        progress.step += 1
        progress.tokens += sum(batch["input_ids"].numel() for batch in micro_batches) * self.accelerator.num_processes
        progress.seconds += time.perf_counter() - began
        return step

    def _train(self, micro_batches: Sequence[Mapping[str, Tensor]], stop_requested: bool) -> _Step:
        """Sum the losses of all micro-batches and processes, divide by their weight, and move the weights once."""
        accelerator, objective = self.accelerator, self.state.objective
        weight, stops = all_reduce_sum(
            accelerator, sum(float(objective.num_items(batch)) for batch in micro_batches), float(stop_requested)
        )
        shares = self._gradients(micro_batches, max(weight, 1.0))
        while shares is None:
            self.optimizer.zero_grad()
            micro_batches = split_on_oom(micro_batches, self.run, accelerator)
            self.folder.record_run()
            shares = self._gradients(micro_batches, max(weight, 1.0))
        grad_norm = accelerator.clip_grad_norm_(self.forward.parameters(), self.run.max_grad_norm)
        mean_loss, *observed_means = all_reduce_sum(accelerator, *shares.tolist())
        observed = dict(zip(objective.metric_names, observed_means, strict=True))
        step = _Step(mean_loss, observed, float(grad_norm), weight, stops > 0)
        scaler = accelerator.scaler
        if step.flaw is None or (scaler is not None and step.weight > 0):
            self.optimizer.step()  # with a scaler, which skips what is not finite by itself, and learns from it
        elif scaler is not None:
            scaler.update()  # forget that these gradients were unscaled
        self.optimizer.zero_grad()
        return step

    def _gradients(self, micro_batches: Sequence[Mapping[str, Tensor]], weight: float) -> Tensor | None:
        """Add up the gradients of this process's losses over `weight`; return what `forward` gave over it.

        None if the memory is short.
        """
        accelerator = self.accelerator
        means = torch.zeros(1 + len(self.state.objective.metric_names), device=accelerator.device)
        try:
            for number, batch in enumerate(micro_batches, start=1):
                with sync_gradients(self.forward, accelerator, number == len(micro_batches)), accelerator.autocast():
                    shares = self.forward(send_to_device(batch, accelerator.device)).reshape(-1) / weight
                    # Gradients are averaged over the processes, and their sum is wanted.
                    accelerator.backward(shares[0] * accelerator.num_processes)
                means += shares.detach()
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            return None  # what the failed pass holds goes with its traceback
        return means

    def _account_for(self, step: _Step) -> None:
        """Count a step that left the weights as they were, and give up after too many in a row."""
        progress, run = self.progress, self.run
        if step.flaw is None:
            progress.skipped_in_a_row = 0
            return
        progress.skipped_steps += 1
        progress.skipped_in_a_row += 1
        self.accelerator.print(f"step {progress.step} is skipped: {step.flaw}")
        if progress.skipped_in_a_row >= run.max_bad_steps:
            raise UserError(
                f"no step of the last {run.max_bad_steps} could be used: {step.flaw}. Try a lower learning_rate and "
                f"resume from a checkpoint in {self.folder.checkpoints} (--resume_from_checkpoint latest)"
            )

    def _measured(self, step: _Step) -> dict[str, float]:
        """What `metrics.jsonl` says of a step, and of the time since the last line."""
        progress = self.progress
        now = (progress.tokens, progress.seconds, self.data_seconds)
        tokens, seconds, waited = (new - old for new, old in zip(now, self.logged_at, strict=True))
        self.logged_at = now
        share_of_peak = mfu(self.run, self.state.model.config, tokens / seconds, self.machine)
        return {
            "loss": step.loss,
            **step.observed,
            "learning_rate": self.state.optimizer.param_groups[0]["lr"],
            "grad_norm": step.grad_norm,
            "skipped_steps": progress.skipped_steps,
            "tokens_per_second": tokens / seconds,
            **({} if share_of_peak is None else {"mfu": share_of_peak}),
            "data_wait_share": waited / seconds,
            "peak_memory_bytes": peak_memory_bytes(self.accelerator.device),
        }

    def _checked(self) -> dict[str, float]:
        """The results of the checks that are due, on a model that does not learn from them."""
        results: dict[str, float] = {}
        for check in self.checks:
            if self.progress.step == 0 or self._is_due(check.every_steps):
                with evaluating(self.state.objective):
                    results |= check.run(self.progress.step)
        return results

    def _is_due(self, every_steps: int) -> bool:
        return self.progress.step % every_steps == 0 or self.progress.step == self.run.max_steps

    def _write(self, measured: Mapping[str, float]) -> None:
        if measured:
            progress = self.progress
            place = {"step": progress.step, "tokens": progress.tokens, "seconds": round(progress.seconds, 3)}
            self.folder.append("metrics.jsonl", {**place, **measured})
            self.accelerator.log({**place, **measured}, step=progress.step)

    def _save(self) -> None:
        try:
            self.on_checkpoint(self.state.save(self.folder.checkpoints, self.run.save_total_limit))
        except OSError as error:
            print(f"no checkpoint of step {self.progress.step}, the earlier ones are whole: {error}")
