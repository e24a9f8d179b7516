"""Time steps that leave no trace, to learn how many of them fit the time of a run."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import psutil

from fgpt_hf.losses.objectives import Batch
from fgpt_hf.runtime.distributed import from_main_process, restored_random_state
from fgpt_hf.runtime.plan import split_batch
from fgpt_hf.training.state import TrainingState
from fgpt_hf.training.step import Stepper

TIMED_MICRO_BATCHES = 3  # of a step; more take as long as these
REPEATS, LONG_SECONDS = 3, 5.0  # a step is timed so often, or until that took so long


def time_first_step(stepper: Stepper, micro_batches: Sequence[Batch], rows_open: bool) -> tuple[list[Batch], float]:
    """Return the first step's rows, in the micro-batches of the plan that is left, and the seconds of the step.

    Where the rows of a micro-batch are open, smaller ones are tried too, and the stepper's plan is then the fastest.
    """
    largest, times = stepper.plan.rows, {}
    with without_trace(stepper.state):
        for part in (1, 2, 4) if rows_open else (1,):
            if largest % part == 0:
                stepper.plan = stepper.plan.with_rows(largest // part)
                stepper.take(
                    _divided(micro_batches, stepper.plan.rows)[:2], 0
                ).read()  # compiles, allocates, may lack memory
                batches = _divided(micro_batches, stepper.plan.rows)
                seconds = step_seconds(lambda some: stepper.take(some, 0).read(), batches)
                times[stepper.plan] = seconds  # by what is left of the plan if memory ran out
    stepper.plan, seconds = from_main_process(min(times.items(), key=lambda timed: timed[1]))
    return _divided(micro_batches, stepper.plan.rows), seconds


@contextmanager
def without_trace(state: TrainingState) -> Iterator[None]:
    """Let the steps of a run that has not begun change nothing that its trajectory depends on.

    With a learning rate of zero the weights stay bit for bit as they are. Random number generators and the loss scaler
    are restored, and what the optimizers gathered is dropped.
    """
    scaler = state.accelerator.scaler
    scaling = scaler.state_dict() if scaler else None
    with restored_random_state():
        state.optimizer.set_learning_rate(0.0)
        yield
    state.optimizer.forget()
    if scaler and scaling:
        scaler.load_state_dict(scaling)


def step_seconds(train: Callable[[Sequence[Batch]], object], micro_batches: Sequence[Batch]) -> float:
    """Return the seconds of a step on these micro-batches.

    Of many, a few are timed: each further one takes as long as each after the first, which also pays for the update of
    the weights.
    """
    some = micro_batches[:TIMED_MICRO_BATCHES]
    seconds = _median_seconds(train, some)
    if further := len(micro_batches) - len(some):
        each = (seconds - _median_seconds(train, micro_batches[:1])) / (len(some) - 1)
        seconds += further * max(each, seconds / (2 * len(some)))  # whatever the noise, at least half of the mean
    return seconds


def spent_seconds() -> float:
    """Return how long the main process has run."""
    return from_main_process(time.time() - psutil.Process().create_time())


def _divided(micro_batches: Sequence[Batch], rows: int) -> list[Batch]:
    return [part for batch in micro_batches for part in split_batch(batch, rows)]


def _median_seconds(train: Callable[[Sequence[Batch]], object], micro_batches: Sequence[Batch]) -> float:
    seconds: list[float] = []
    while len(seconds) < REPEATS and sum(seconds) < LONG_SECONDS:
        began = time.perf_counter()
        train(micro_batches)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)
