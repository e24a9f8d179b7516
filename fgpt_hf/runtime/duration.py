"""How long a run takes: a prediction before its first step, and how many timed steps fit a given time."""

import bisect
import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch

from fgpt_hf.errors import UserError
from fgpt_hf.runtime.hardware import product_flops
from fgpt_hf.runtime.workload import Workload

LIKELY_MFU = 0.4  # between the original FGPT's 0.24 on a GH200 and nanochat's 0.54 on H100s
MIN_STEPS = 10  # of a run whose length follows from its time: below, there is no schedule to speak of
MAX_STEPS = 10**9
MEASURED_ROWS = 2048  # of the products that measure a device without a data sheet
BYTES_PER_SECOND = 200e6  # of a slow disk, with the hashes of what is written
CLOSING_SECONDS = 3.0  # for the figures and the report


class CheckTime(NamedTuple):
    """The seconds that a check takes, and the steps between two of them; the last step always has one."""

    seconds: float
    every_steps: int


class Steps(NamedTuple):
    """What the steps of a run take of time.

    Attributes:
        step_seconds: a step, without checks.
        checks: what is measured along the way.
        closing_seconds: the last checkpoint, the model and the report.
    """

    step_seconds: float
    checks: Sequence[CheckTime] = ()
    closing_seconds: float = 0.0

    def seconds_of(self, steps: int) -> float:
        """Return the time that this many steps take, from before the first one to the end of the run."""
        checks = sum(check.seconds * ((steps - 1) // check.every_steps + 1) for check in self.checks)
        return steps * self.step_seconds + checks + self.closing_seconds

    def within(self, seconds: float) -> int:
        """Return the greatest number of steps that take `seconds` at most.

        Example:
            >>> Steps(0.5, [CheckTime(4.0, every_steps=10)], closing_seconds=2.0).within(60)
            60
        """
        return bisect.bisect_right(range(1, MAX_STEPS), seconds, key=self.seconds_of)


def closing_seconds(parameters: int) -> float:
    """Return the time to write a last checkpoint, with AdamW's state, and the model: 16 bytes for each parameter."""
    return CLOSING_SECONDS + 16 * parameters / BYTES_PER_SECOND


def require_steps(minutes: float, steps: Steps, spent_seconds: float) -> None:
    """Raise UserError if fewer than `MIN_STEPS` fit `minutes`, of which `spent_seconds` are spent."""
    if steps.within(60 * minutes - spent_seconds) >= MIN_STEPS:
        return
    needed = (spent_seconds + steps.seconds_of(MIN_STEPS)) / 60
    spent = f", {duration(spent_seconds)} after the start" if spent_seconds else ""
    raise UserError(
        f"max_minutes={minutes:g} is too short for {MIN_STEPS} steps: each takes {duration(steps.step_seconds)} here"
        f"{spent}; try --max_minutes {_rounded_up(needed)}, fewer rows per step, or a smaller --preset"
    )


def require_time(workload: Workload) -> None:
    """Raise UserError if a run's `max_minutes` is hopelessly short, so that it is refused before its data is read.

    That is where ten steps take twice the time even at the peak of the hardware.
    """
    minutes, machine = workload.run.max_minutes, workload.machine
    if minutes is None or (machine.peak_flops is None and machine.processes > 1):  # each would measure its own
        return
    step_seconds = likely_seconds(workload, workload.tokens_per_step, mfu=1.0)
    if MIN_STEPS * step_seconds > 2 * 60 * minutes:
        require_steps(minutes, Steps(step_seconds / LIKELY_MFU), spent_seconds=0.0)


def likely_seconds(workload: Workload, tokens: int, mfu: float = LIKELY_MFU) -> float:
    """Return how long a run is likely to train on this many tokens."""
    return workload.flops_per_token * tokens / (peak_flops(workload) * workload.machine.processes * mfu)


def peak_flops(workload: Workload) -> float:
    """Return a device's peak, from its data sheet, or else the rate at which it multiplies, measured now."""
    machine = workload.machine
    if machine.peak_flops is not None:
        return machine.peak_flops
    dtype = torch.bfloat16 if workload.is_low_precision else torch.float32
    return product_flops(torch.device(machine.kind), MEASURED_ROWS, workload.shape.hidden_size, dtype)


def duration(seconds: float) -> str:
    """Return a time in words.

    Example:
        >>> duration(0.032), duration(50), duration(1500), duration(7200), duration(1e6)
        ('0.032 s', '50 s', '25 minutes', '2.0 hours', '11.6 days')
    """
    if seconds < 90:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def time_of_day(seconds_from_now: float) -> str:
    """Return the hour at which something ends, with the date if that is another day's."""
    now, then = time.time(), time.time() + seconds_from_now
    same_day = time.strftime("%F", time.localtime(now)) == time.strftime("%F", time.localtime(then))
    return time.strftime("%H:%M" if same_day else "%H:%M on %B %d", time.localtime(then))


def _rounded_up(minutes: float) -> str:
    """Return a little more than this many minutes, as the option takes it."""
    return f"{math.ceil(minutes * 1.1)}" if minutes < 600 else f"{math.ceil(minutes * 1.1 / 60)}h"
