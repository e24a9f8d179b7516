"""What a run is about to do: how often it will see its data, and when it ends."""

from collections.abc import Sequence
from typing import NamedTuple

from fgpt_hf.runtime.duration import MIN_STEPS, CheckTime, Steps, duration, time_of_day
from fgpt_hf.runtime.plan import TrainingPlan
from fgpt_hf.training.state import Progress
from fgpt_hf.wording import count_of

TIMED_STEPS = 5  # before the end of a run is foreseen


class Epoch(NamedTuple):
    """The training data, seen once: its rows, what to call it in a message, and the tokens of its text if known."""

    rows: int
    name: str
    tokens: int | None = None

    def times_seen(self, plan: TrainingPlan, processes: int) -> float:
        """Return how often a run will see the data."""
        return plan.max_steps * plan.rows * plan.micro_batches * processes / self.rows

    def describe(self, plan: TrainingPlan, processes: int) -> str:
        """Return a sentence on how often a run will see the data.

        Example:
            >>> plan = TrainingPlan(max_steps=100, rows=8, micro_batches=1)
            >>> Epoch(rows=200, name="48,000 tokens").describe(plan, processes=1)
            '100 steps: its 48,000 tokens will be seen 4.0 times'
        """
        times = self.times_seen(plan, processes)
        seen = f"its {self.name} will be seen {times:,.1f} times" if times >= 1 else f"{times:.2g} of its {self.name}"
        return f"{count_of(plan.max_steps, 'step')}: {seen}{'' if times >= 1 else ' will be seen'}"


class Forecast:
    """Foresees the end of a run once a few of its steps are taken.

    Args:
        first_step: the step that this start of the run begins after.
        max_steps: its last step.
    """

    def __init__(self, first_step: int, max_steps: int) -> None:
        self._first_step, self._max_steps = first_step, max_steps
        self._seconds = 0.0  # at the end of this start's first step

    def observe(self, progress: Progress, checks: Sequence[CheckTime], closing_seconds: float) -> str | None:
        """Return a sentence on when the run ends, after step `TIMED_STEPS` of this start, and None after the others."""
        taken, left = progress.step - self._first_step, self._max_steps - progress.step
        if taken == 1:
            self._seconds = progress.seconds
        if taken != TIMED_STEPS or left < MIN_STEPS:
            return None
        step_seconds = (progress.seconds - self._seconds) / (TIMED_STEPS - 1)
        until = time_of_day(Steps(step_seconds, checks, closing_seconds).seconds_of(left))
        return f"{duration(step_seconds)} a step: the run ends at about {until}"
