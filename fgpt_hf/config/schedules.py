"""Learning-rate schedules: functions of the progress after the warm-up, from 0 to 1, and of the final fraction."""

import math
from collections.abc import Callable, Mapping


def learning_rate_factor(kind: str, step: int, max_steps: int, warmup_steps: int, min_ratio: float = 0.0) -> float:
    """Return the learning rate at `step`, counted from 0, as a fraction of its peak.

    The rate rises linearly over `warmup_steps`, and then follows the schedule `kind` over the remaining steps.

    Example:
        >>> [learning_rate_factor("linear", step, max_steps=6, warmup_steps=2) for step in range(6)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, max_steps - warmup_steps)
    return SCHEDULES[kind](min(progress, 1.0), min_ratio)


def cosine(progress: float, min_ratio: float) -> float:
    """Decay from 1 to `min_ratio` along half a cosine (Loshchilov and Hutter 2017, arXiv:1608.03983).

    Example:
        >>> cosine(0.5, min_ratio=0.1)
        0.55
    """
    return min_ratio + (1 - min_ratio) * (1 + math.cos(math.pi * progress)) / 2


def linear(progress: float, min_ratio: float) -> float:
    """Decay from 1 to 0 along a line (Bergsma et al. 2025, arXiv:2502.15938); `min_ratio` has no effect.

    Example:
        >>> linear(0.25, min_ratio=0.1)
        0.75
    """
    return 1 - progress


def warmup_stable_decay(progress: float, min_ratio: float) -> float:
    """Stay at 1, then decay to `min_ratio` along a line over the last fifth (Hägele et al. 2024, arXiv:2405.18392).

    The warm-up before is `learning_rate_factor`'s, as for every schedule.

    Example:
        >>> warmup_stable_decay(0.5, min_ratio=0.1), round(warmup_stable_decay(0.9, min_ratio=0.1), 3)
        (1.0, 0.55)
    """
    return 1 - (1 - min_ratio) * max(0.0, progress - 0.8) / 0.2


def constant(progress: float, min_ratio: float) -> float:
    """Stay at 1.

    Example:
        >>> constant(0.9, min_ratio=0.1)
        1.0
    """
    return 1.0


SCHEDULES: Mapping[str, Callable[[float, float], float]] = {
    schedule.__name__: schedule for schedule in (cosine, linear, warmup_stable_decay, constant)
}
