"""Take optimizer steps, whatever the number of processes and micro-batches, and whatever memory allows."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from accelerate.utils import send_to_device
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn

from fgpt_hf.runtime.distributed import all_reduce_sum, sync_gradients
from fgpt_hf.runtime.plan import TrainingPlan, split_on_oom
from fgpt_hf.training.checkpoints import TrainingState
from fgpt_hf.workers import STOP_SIGNALS


class Step(NamedTuple):
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


class Stepper:
    """Moves the weights of a run.

    Attributes:
        forward: the objective as the processes share it.
        state: the model and its optimizer.
        plan: how a step is divided; with smaller micro-batches once memory ran out.
    """

    def __init__(self, forward: nn.Module, state: TrainingState, plan: TrainingPlan, max_grad_norm: float) -> None:
        self.forward, self.state, self.plan, self.max_grad_norm = forward, state, plan, max_grad_norm
        self.accelerator = state.accelerator
        self.prepared = state.accelerator.prepare_optimizer(state.optimizer)  # the same one, with the loss scaler

    def take(self, micro_batches: Sequence[Mapping[str, Tensor]], received_signal: int) -> Step:
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
            self.prepared.zero_grad()
            micro_batches, self.plan = split_on_oom(micro_batches, self.plan, accelerator)
            means = self._accumulate_gradients(micro_batches, max(num_items, 1.0))
        grad_norm = accelerator.clip_grad_norm_(self.forward.parameters(), self.max_grad_norm)
        loss, *others = all_reduce_sum(accelerator, *means.tolist())
        metrics = dict(zip(objective.metric_names, others, strict=True))
        step = Step(loss, metrics, float(grad_norm), num_items, stop_signal)
        scaler = accelerator.scaler
        if step.skip_reason is None or (scaler is not None and num_items > 0):
            self.prepared.step()  # with a scaler, which skips non-finite gradients by itself, and adapts to them
        elif scaler is not None:
            scaler.update()  # forget that these gradients were unscaled
        self.prepared.zero_grad()
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
