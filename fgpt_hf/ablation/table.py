"""The result of a comparison: a Markdown table, and a figure.

Variants are compared by their bits per byte, because losses in nats depend on how much text a token stands for.
"""

import math
import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fgpt_hf.ablation.trials import TrialResult
from fgpt_hf.report.figures import new_axes, save_figure, style_axes

COLUMNS = (
    *("variant", "rate", "validation loss", "bits per byte", "of the default's tokens", "tokens/s", "memory, MiB"),
    "parameters",
)
LABEL_CHARACTERS = 80  # of a line of the figure's legend


@dataclass(frozen=True)
class Summary:
    """A variant at its best learning rate.

    Attributes:
        results: one for each seed.
        tokens_share: the tokens after which the mean of the bits per byte is the default's final one, as a share of
            all; None if it never is.
        speed: tokens per second, as a ratio to the default's.
    """

    variant: str
    results: Sequence[TrialResult]
    tokens_share: float | None
    speed: float

    @property
    def loss(self) -> float:
        """The mean of the final validation losses in nats."""
        return statistics.fmean(result.loss for result in self.results)

    @property
    def bits(self) -> float:
        """The mean of the final bits per byte."""
        return statistics.fmean(result.bits for result in self.results)


def summarize(results: Sequence[TrialResult]) -> list[Summary]:
    """Return a summary of each variant, in the order of the results; the first variant is the default.

    The best rate of a variant is the one with the lowest final loss at the first seed.
    """
    names = list(dict.fromkeys(result.variant for result in results))
    best = {name: _at_best_rate([result for result in results if result.variant == name]) for name in names}
    default = best[names[0]]
    target = statistics.fmean(result.bits for result in default)
    default_speed = statistics.fmean(result.tokens_per_second for result in default)
    return [
        Summary(
            name,
            of_variant,
            tokens_share(mean_curve(of_variant), target),
            statistics.fmean(result.tokens_per_second for result in of_variant) / default_speed,
        )
        for name, of_variant in best.items()
    ]


def _at_best_rate(results: Sequence[TrialResult]) -> list[TrialResult]:
    first_seed = results[0].seed
    rate = min((each for each in results if each.seed == first_seed), key=lambda each: each.loss).learning_rate
    return [result for result in results if result.learning_rate == rate]


def mean_curve(results: Sequence[TrialResult]) -> list[tuple[float, float]]:
    """Return the tokens and the mean bits per byte of runs that were measured at the same steps."""
    return [
        (points[0][0], statistics.fmean(bits for _, bits in points))
        for points in zip(*(result.bits_curve for result in results), strict=True)
    ]


def tokens_share(curve: Sequence[tuple[float, float]], target: float) -> float | None:
    """Return the share of a run's tokens after which its loss first is a target's, linear between measurements.

    Example:
        >>> tokens_share([(0, 8.0), (100, 6.0), (200, 4.0)], target=5.0)
        0.75
        >>> tokens_share([(0, 8.0), (200, 4.0)], target=3.0) is None
        True
    """
    last, _ = curve[-1]
    for (start, before), (end, after) in zip(curve, curve[1:], strict=False):
        if after <= target:
            passed = (before - target) / (before - after) if before > after else 1.0
            return (start + max(0.0, passed) * (end - start)) / last
    return None


def markdown_table(summaries: Sequence[Summary]) -> str:
    """Return a Markdown table with a line for each variant.

    Losses and bits are means over the seeds with their standard deviation; speed is relative to the default.
    """
    rows = [COLUMNS, ("---",) * len(COLUMNS), *map(_row, summaries)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(summary: Summary) -> tuple[str, ...]:
    first = summary.results[0]
    return (
        summary.variant,
        first.learning_rate or "the run's",
        with_spread([result.loss for result in summary.results]),
        with_spread([result.bits for result in summary.results]),
        "never" if summary.tokens_share is None else f"{summary.tokens_share:.2f}",
        f"{summary.speed:.2f}",
        f"{max(result.peak_memory_bytes for result in summary.results) / 2**20:,.0f}",
        f"{first.parameters:,}",
    )


def with_spread(values: Sequence[float]) -> str:
    """Return the mean of values, and of several their standard deviation.

    Example:
        >>> with_spread([4.0, 4.2]), with_spread([4.0])
        ('4.100 ± 0.141', '4.000')
    """
    spread = statistics.stdev(values) if len(values) > 1 and math.isfinite(sum(values)) else 0.0
    return f"{statistics.fmean(values):.3f}" + (f" ± {spread:.3f}" if len(values) > 1 else "")


def draw_losses(summaries: Sequence[Summary], file: Path) -> None:
    """Draw the mean bits per byte of each variant against tokens, and the range over its seeds."""
    canvas, (axes,) = new_axes(height=5.5)
    for index, summary in enumerate(summaries):
        tokens, bits = zip(*mean_curve(summary.results), strict=True)
        seeds = list(zip(*(result.bits_per_byte for result in summary.results), strict=True))
        label = _wrapped(f"{summary.bits:.3f} at the end: {summary.variant}")
        axes.plot(tokens, bits, color=f"C{index}", linewidth=1.5, label=label)
        axes.fill_between(tokens, list(map(min, seeds)), list(map(max, seeds)), color=f"C{index}", alpha=0.2)
    # The first measurement is of the untrained network, which would flatten all that follows.
    shown = [bits for summary in summaries for _, bits in mean_curve(summary.results)[1:] if math.isfinite(bits)]
    if shown:
        axes.set_ylim(min(shown) - 0.05, max(shown) + 0.05)
    style_axes(axes, "tokens", "bits per byte of held-out text")
    canvas.legend(loc="outside lower left", frameon=False, fontsize="small")
    save_figure(canvas, file)


def _wrapped(label: str) -> str:
    """Break a label between the settings of its variant, to leave the axes their width."""
    return "\n".join(textwrap.wrap(label.replace(",", ", "), LABEL_CHARACTERS, break_on_hyphens=False))
