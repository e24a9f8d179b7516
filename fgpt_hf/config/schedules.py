"""Learning-rate schedules: functions of the progress after the warm-up, from 0 to 1, and of the final fraction."""

import math
from collections.abc import Callable, Mapping


def learning_rate_factor(
    kind: str, step: int, max_steps: int, warmup_steps: int, min_ratio: float = 0.0, decay_ratio: float = 1.0
) -> float:
    """Return the learning rate at `step`, counted from 0, as a fraction of its peak.

    The rate rises linearly over `warmup_steps`, stays, and follows the schedule `kind` over the last `decay_ratio` of
    the remaining steps.

    Example:
        >>> [learning_rate_factor("linear", step, max_steps=6, warmup_steps=2) for step in range(6)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
        >>> [learning_rate_factor("linear", step, max_steps=6, warmup_steps=2, decay_ratio=0.5) for step in range(6)]
        [0.5, 1.0, 1.0, 1.0, 1.0, 0.5]
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, max_steps - warmup_steps)
    return SCHEDULES[kind](max(0.0, min(progress, 1.0) - (1 - decay_ratio)) / decay_ratio, min_ratio)


def weight_decay_factor(kind: str, step: int, max_steps: int) -> float:
    """Return the weight decay at `step`, counted from 0, as a fraction of the run's; schedules that fall end at zero.

    Example:
        >>> [weight_decay_factor("cosine", step, max_steps=2) for step in range(3)]
        [1.0, 0.5, 0.0]
    """
    return SCHEDULES[kind](min(step / max_steps, 1.0), 0.0)


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
