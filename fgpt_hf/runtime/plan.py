"""Plan a run before its first step: its length, its micro-batches, its memory and its time."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache
from torch import Tensor

from fgpt_hf.config.runs import PreferenceRun, Run, TuningRun
from fgpt_hf.errors import UserError
from fgpt_hf.runtime.duration import LIKELY_MFU, duration, likely_seconds, require_time
from fgpt_hf.runtime.workload import USABLE_SHARE, Workload
from fgpt_hf.wording import count_of

logger = logging.getLogger(__name__)

SomeRun = TypeVar("SomeRun", bound=Run)

PARTS = ("weights", "gradients", "optimizer", "activations", "loss", "working")
FAR_ABOVE = 2  # more than the estimate may be wrong by


@dataclass(frozen=True)
class TrainingPlan:
    """The numbers that a run may leave open until its data and its machine are known.

    Attributes:
        max_steps: optimizer steps of the whole run.
        rows: rows of a micro-batch on each device.
        micro_batches: micro-batches per step on each device.
        warmup_steps: steps of the warm-up, if not the run's.
        minutes: time of the whole run, from which `max_steps` and `warmup_steps` are still to be decided; None if they
            are.

    Example:
        >>> TrainingPlan(max_steps=100, rows=8, micro_batches=2).with_rows(4).micro_batches
        4
    """

    max_steps: int
    rows: int
    micro_batches: int
    warmup_steps: int | None = None
    minutes: float | None = None

    def with_rows(self, rows: int) -> "TrainingPlan":
        """Return the plan with micro-batches of `rows` rows and as many rows per step as before."""
        return replace(self, rows=rows, micro_batches=self.rows * self.micro_batches // rows)

    def with_steps(self, steps: int, run: Run) -> "TrainingPlan":
        """Return the plan with a decided number of steps, of which the warm-up takes an eighth at most."""
        return replace(self, max_steps=steps, warmup_steps=min(run.warmup_steps, steps // 8), minutes=None)

    def fill_in(self, run: SomeRun) -> SomeRun:
        """Return the run with nothing left open, as `run.yaml` records it."""
        return replace(
            run,
            max_steps=self.max_steps,
            warmup_steps=run.warmup_steps if self.warmup_steps is None else self.warmup_steps,
            per_device_train_batch_size=self.rows,
            gradient_accumulation_steps=self.micro_batches,
            auto_find_batch_size=False,
        )


def plan_training(
    workload: Workload, epoch_rows: int = 0, keep: Callable[[TrainingPlan], TrainingPlan] = lambda plan: plan
) -> TrainingPlan:
    """Decide what the run leaves open, and log what it takes of memory and arithmetic.

    Args:
        epoch_rows: rows of an epoch, for a run whose length is a number of epochs.
        keep: returns the plan with what the run has decided before, if it resumes.

    Raises:
        UserError: as `require_memory`.
    """
    require_memory(workload)
    plan = keep(first_plan(workload, epoch_rows))
    for line in describe_needs(workload, plan):
        logger.info(line)
    return plan


def require_memory(workload: Workload) -> None:
    """Raise UserError if the run does not fit the devices, or ten of its steps `max_minutes`, with any data.

    Either weights, gradients and optimizer take more than a device has, or not even one row fits as well where the
    micro-batch is left open, or a given one takes `FAR_ABOVE` times what a device has; or the rows of a step do not
    divide evenly among the processes. What a micro-batch of preference pairs takes is not known, only a bound.
    """
    run, machine = workload.run, workload.machine
    if run.auto_find_batch_size and workload.largest_micro_batch() is None:
        raise UserError(_refusal(workload))
    rows = 1 if run.auto_find_batch_size else run.per_device_train_batch_size
    need = workload.memory(rows, run.gradient_accumulation_steps)
    if need.fixed > machine.memory_bytes:
        raise UserError(_refusal(workload))
    if need.total > FAR_ABOVE * machine.memory_bytes and not isinstance(run, PreferenceRun):
        largest = workload.largest_micro_batch()
        fits = f"up to {largest} rows fit: try --per_device_train_batch_size auto" if largest else "not one row fits"
        raise UserError(
            f"per_device_train_batch_size={rows} takes {_gigabytes(need.total)}, and {machine.name} has "
            f"{_gigabytes(machine.memory_bytes)}: {fits}"
        )
    require_time(workload)


def first_plan(workload: Workload, epoch_rows: int = 0) -> TrainingPlan:
    """Return the plan of a run that starts: what its options say, and the largest micro-batch where that is open."""
    run, steps = workload.run, workload.run.max_steps
    if isinstance(run, TuningRun) and steps == 0:
        steps = math.ceil(epoch_rows * run.num_train_epochs / run.rows_per_step(workload.machine.processes))
    plan = TrainingPlan(
        steps, run.per_device_train_batch_size, run.gradient_accumulation_steps, minutes=run.max_minutes
    )
    if run.auto_find_batch_size:
        rows = workload.largest_micro_batch() or 1
        return replace(plan, rows=rows, micro_batches=workload.rows_on_device() // rows)
    return plan


def describe_needs(workload: Workload, plan: TrainingPlan, mfu: float = LIKELY_MFU) -> Iterator[str]:
    """Yield lines on parameters, tokens, arithmetic, memory and time."""
    machine, parameters, per_step = workload.machine, workload.counts.total, workload.tokens_per_step
    at_most = "at most " if isinstance(workload.run, PreferenceRun) else ""  # pairs are shorter than the longest ones
    if plan.minutes is not None:
        yield (
            f"{parameters:,} parameters; steps x {at_most}{per_step:,} tokens: "
            f"a few timed ones will decide how many fit max_minutes={plan.minutes:g}"
        )
    else:
        tokens, steps = plan.max_steps * per_step, count_of(plan.max_steps, "step")
        yield (
            f"{parameters:,} parameters; {steps} x {at_most}{per_step:,} tokens = {tokens:,} tokens "
            f"({at_most}{tokens / parameters:.3g} tokens per parameter)"
        )
    if workload.adapter:
        yield f"{workload.adapter:,} further parameters are in adapters, and only these are trained"
    yield _arithmetic(workload, plan, mfu, at_most)
    need = workload.memory(plan.rows, plan.micro_batches)
    parts = ", ".join(f"{part} {_gigabytes(getattr(need, part))}" for part in PARTS)
    own = f", this process itself {_gigabytes(machine.own_bytes)}" if machine.own_bytes else ""
    total = _gigabytes(need.total + machine.own_bytes)
    yield f"about {total} on each device with micro-batches of {count_of(plan.rows, 'row')}: {parts}{own}"
    largest = workload.largest_micro_batch()
    more = " more" if machine.own_bytes else ""
    has = f"{machine.name} has {_gigabytes(machine.memory_bytes)}{more}"
    if largest is None:
        yield f"{has}: {_refusal(workload)}"
    elif need.total > USABLE_SHARE * machine.memory_bytes:
        yield f"{has}, and only micro-batches of {count_of(largest, 'row')} fit: try --per_device_train_batch_size auto"
    else:
        yield f"{has}, and micro-batches of up to {count_of(largest, 'row')} fit"


def _arithmetic(workload: Workload, plan: TrainingPlan, mfu: float, at_most: str) -> str:
    """Return a line on the operations of a run and the time that they are likely to take."""
    flops = workload.flops_per_token
    passes = "6 N, 4 N for frozen weights" if workload.adapter else "6 N"
    line = f"{flops / 1e9:.3g} GFLOPs per token ({passes} + 12 layers x width x length)"
    if plan.minutes is not None:
        return line
    tokens = plan.max_steps * workload.tokens_per_step
    seconds = likely_seconds(workload, tokens, mfu)
    rate = "the peak" if workload.machine.peak_flops else "the rate of its products, measured now"
    took = f"{at_most}{duration(seconds)} of steps at {mfu:.0%} of {rate}"
    return f"{line}, {at_most}{flops * tokens:.3g} FLOPs in total: {took}"


def _refusal(workload: Workload) -> str:
    need, machine = workload.memory(rows=1, micro_batches=2), workload.machine
    return (
        f"preset {workload.run.preset} takes {_gigabytes(need.fixed)} for weights, gradients and optimizer and "
        f"{_gigabytes(need.total)} with a micro-batch of one row, more than the {_gigabytes(machine.memory_bytes)} of "
        f"{machine.name}. What would fit: {'; or '.join(workload.remedies()) or 'a larger device'}"
    )


def _gigabytes(number: int) -> str:
    return f"{number / 1e9:.3g} GB"


def split_on_oom(
    micro_batches: Sequence[Mapping[str, Tensor]], plan: TrainingPlan, accelerator: Accelerator
) -> tuple[list[Mapping[str, Tensor]], TrainingPlan]:
    """Divide the micro-batches of a step that ran out of memory; return the parts, and the plan from here on.

    Each becomes two, or three if its number of rows is odd, and so on. The effective batch size does not change.

    Raises:
        UserError: the micro-batches have a single row; or there are other processes, which wait for this one's
            gradients and cannot be told.
    """
    if plan.rows == 1:
        raise UserError("out of memory with a micro-batch of one row: try --gradient_checkpointing or --fsdp")
    parts = next(number for number in range(2, plan.rows + 1) if plan.rows % number == 0)
    smaller = plan.with_rows(plan.rows // parts)
    if accelerator.num_processes > 1:
        raise UserError(
            f"out of memory with micro-batches of {plan.rows} rows: try --per_device_train_batch_size {smaller.rows} "
            f"--gradient_accumulation_steps {smaller.micro_batches}"
        )
    clear_device_cache(garbage_collection=True)
    logger.warning(
        "out of memory with micro-batches of %d rows: continuing with %d micro-batches of %d rows; the effective batch "
        "size is unchanged",
        *(plan.rows, smaller.micro_batches, smaller.rows),
    )
    return [part for batch in micro_batches for part in split_batch(batch, smaller.rows)], smaller


def split_batch(batch: Mapping[str, Tensor], rows: int) -> list[dict[str, Tensor]]:
    """Divide a micro-batch into smaller ones of `rows` rows."""
    pieces = zip(*(torch.split(tensor, rows) for tensor in batch.values()), strict=True)
    return [dict(zip(batch, piece, strict=True)) for piece in pieces]
