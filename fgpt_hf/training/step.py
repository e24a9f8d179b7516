"""Take optimizer steps on any number of processes and micro-batches, which get smaller where memory runs out."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fgpt_hf.runtime.distributed import sync_gradients
from fgpt_hf.runtime.plan import TrainingPlan, split_on_oom
from fgpt_hf.runtime.transfers import HostCopy, to_device
from fgpt_hf.training.state import TrainingState
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


class TakenStep(NamedTuple):
    """A step that is queued on the device: its outcome is read later, so that the device need not wait for the host.

    Attributes:
        copy: loss, metrics, norm of the gradient, and with several processes the number of loss terms and the counts of
            stop signals.
        metric_names: of the metrics.
        counts: the number of loss terms and the counts of stop signals, if this process knows them by itself.
    """

    copy: HostCopy
    metric_names: Sequence[str]
    counts: Sequence[float] | None

    @property
    def may_stop(self) -> bool:
        """Whether it is known already that a signal asked to stop."""
        return self.counts is not None and any(self.counts[1:])

    def read(self) -> Step:
        """Return the outcome, once the device has come to it."""
        loss, *others = self.copy.read()
        metrics = dict(zip(self.metric_names, others, strict=False))
        grad_norm, *counts = others[len(metrics) :]
        num_items, *signals = counts if self.counts is None else self.counts
        stop_signal = next((number for number, count in zip(STOP_SIGNALS, signals, strict=True) if count), 0)
        return Step(loss, metrics, grad_norm, num_items, stop_signal)


class Stepper:
    """Moves the weights of a run. Nothing in a step waits for the device, but for float16's scaling of the loss.

    Attributes:
        forward: the objective as the processes share it.
        state: the model and its optimizer.
        plan: how a step is divided; with smaller micro-batches once memory ran out.
    """

    def __init__(self, forward: nn.Module, state: TrainingState, plan: TrainingPlan, max_grad_norm: float) -> None:
        self.forward, self.state, self.plan, self.max_grad_norm = forward, state, plan, max_grad_norm
        self.accelerator = state.accelerator
        self.prepared = state.accelerator.prepare_optimizer(state.optimizer)  # the same one, with the loss scaler

    def take(self, micro_batches: Sequence[Mapping[str, Tensor]], received_signal: int) -> TakenStep:
        """Move the weights once, by the mean loss over all micro-batches and processes."""
        accelerator, objective = self.accelerator, self.state.objective
        num_items = sum(float(objective.num_items(batch)) for batch in micro_batches)
        counts = [num_items, *(float(received_signal == number) for number in STOP_SIGNALS)]
        shared = self._sum_over_processes(counts)
        divisor = max(num_items, 1.0) if shared is None else shared[0].clamp(min=1.0)
        batches: Sequence[Mapping[str, Tensor]] = [to_device(batch, accelerator.device) for batch in micro_batches]
        means = self._accumulate_gradients(batches, divisor)
        while means is None:  # out of memory
            self.prepared.zero_grad()
            batches, self.plan = split_on_oom(batches, self.plan, accelerator)
            means = self._accumulate_gradients(batches, divisor)
        norm = accelerator.clip_grad_norm_(self.forward.parameters(), self.max_grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        has_items = torch.full_like(norm, counts[0]) > 0 if shared is None else shared[0] > 0
        self._move(norm.isfinite(), has_items)
        if shared is None:
            return TakenStep(HostCopy(torch.cat([means, norm[None]])), objective.metric_names, counts)
        values = torch.cat([accelerator.reduce(means.double()), norm[None].double(), shared])
        return TakenStep(HostCopy(values), objective.metric_names, None)

    def _sum_over_processes(self, values: Sequence[float]) -> Tensor | None:
        """Return the sums over all processes, float64 on the device; None if there is one process."""
        if self.accelerator.num_processes == 1:
            return None
        own = to_device({"values": torch.tensor(values, dtype=torch.float64)}, self.accelerator.device)["values"]
        total: Tensor = self.accelerator.reduce(own)
        return total

    def _move(self, is_finite: Tensor, has_items: Tensor) -> None:
        """Let the optimizers move the weights, if the gradients are finite and of something."""
        scaler, optimizer = self.accelerator.scaler, self.state.optimizer
        if scaler is None:
            optimizer.skip = (is_finite & has_items).logical_not().float()
            self.prepared.step()
            optimizer.skip = None
        elif has_items:  # which waits for the device, as the scaler does
            self.prepared.step()  # the scaler skips non-finite gradients by itself, and adapts to them
        else:
            scaler.update()  # forget that these gradients were unscaled
        self.prepared.zero_grad()

    def _accumulate_gradients(
        self, batches: Sequence[Mapping[str, Tensor]], num_items: Tensor | float
    ) -> Tensor | None:
        """Add up this process's gradients; return its losses and metrics over `num_items`, or None if out of memory."""
        accelerator = self.accelerator
        means = torch.zeros(1 + len(self.state.objective.metric_names), device=accelerator.device)
        try:
            for number, batch in enumerate(batches, start=1):
                with sync_gradients(self.forward, accelerator, number == len(batches)), accelerator.autocast():
                    parts = self.forward(batch).reshape(-1) / num_items
                    # Gradients are averaged over the processes, but their sum is needed.
                    accelerator.backward(parts[0] * accelerator.num_processes)
                means += parts.detach()
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            return None  # the failed pass's tensors are freed with its traceback
        return means
