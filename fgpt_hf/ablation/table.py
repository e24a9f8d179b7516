"""The result of a comparison: a Markdown table, and a figure of the validation losses."""

import math
import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fgpt_hf.ablation.trials import TrialResult

COLUMNS = ("variant", "rate", "validation loss", "of the default's tokens", "tokens/s", "memory, MiB", "parameters")
LABEL_CHARACTERS = 80  # of a line of the figure's legend


@dataclass(frozen=True)
class Summary:
    """A variant at its best learning rate.

    Attributes:
        results: one for each seed.
        tokens_share: the tokens after which the mean loss is the default's final one, as a share of all; None if it
            never is.
        speed: tokens per second, as a ratio to the default's.
    """

    variant: str
    results: Sequence[TrialResult]
    tokens_share: float | None
    speed: float

    @property
    def loss(self) -> float:
        """The mean of the final validation losses."""
        return statistics.fmean(result.loss for result in self.results)

    @property
    def spread(self) -> float:
        """The standard deviation of the final losses over the seeds; 0 for a single one."""
        losses = [result.loss for result in self.results]
        return statistics.stdev(losses) if len(losses) > 1 and math.isfinite(sum(losses)) else 0.0


def summarize(results: Sequence[TrialResult]) -> list[Summary]:
    """Return a summary of each variant, in the order of the results; the first variant is the default.

    The best rate of a variant is the one with the lowest final loss at the first seed.
    """
    names = list(dict.fromkeys(result.variant for result in results))
    best = {name: _at_best_rate([result for result in results if result.variant == name]) for name in names}
    default = best[names[0]]
    target = statistics.fmean(result.loss for result in default)
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
    """Return the tokens and the mean validation losses of runs that were measured at the same steps."""
    return [
        (points[0][0], statistics.fmean(loss for _, loss in points))
        for points in zip(*(result.curve for result in results), strict=True)
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

    Losses are means over the seeds with their standard deviation; speed is relative to the default.
    """
    rows = [COLUMNS, ("---",) * len(COLUMNS), *map(_row, summaries)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(summary: Summary) -> tuple[str, ...]:
    first = summary.results[0]
    loss = f"{summary.loss:.3f}" + (f" ± {summary.spread:.3f}" if len(summary.results) > 1 else "")
    return (
        summary.variant,
        first.learning_rate or "the run's",
        loss,
        "never" if summary.tokens_share is None else f"{summary.tokens_share:.2f}",
        f"{summary.speed:.2f}",
        f"{max(result.peak_memory_bytes for result in summary.results) / 2**20:,.0f}",
        f"{first.parameters:,}",
    )


def draw_losses(summaries: Sequence[Summary], file: Path) -> None:
    """Draw the mean validation loss of each variant against tokens, and the range over its seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(7, 5.5), dpi=150, layout="constrained")
    FigureCanvasAgg(canvas)
    axes = canvas.add_subplot()
    for index, summary in enumerate(summaries):
        tokens, losses = zip(*mean_curve(summary.results), strict=True)
        seeds = list(zip(*([loss for _, loss in result.curve] for result in summary.results), strict=True))
        label = _wrapped(f"{summary.loss:.3f} at the end: {summary.variant}")
        axes.plot(tokens, losses, color=f"C{index}", linewidth=1.5, label=label)
        axes.fill_between(tokens, list(map(min, seeds)), list(map(max, seeds)), color=f"C{index}", alpha=0.2)
    # The first measurement is of the untrained network: its loss would flatten all that follows.
    shown = [loss for summary in summaries for _, loss in mean_curve(summary.results)[1:] if math.isfinite(loss)]
    if shown:
        axes.set_ylim(min(shown) - 0.1, max(shown) + 0.1)
    axes.set_xlabel("tokens")
    axes.set_ylabel("validation loss, nats")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    canvas.legend(loc="outside lower left", frameon=False, fontsize="small")
    canvas.savefig(file)


def _wrapped(label: str) -> str:
    """Break a label between the settings of its variant, so that it leaves the axes their width."""
    return "\n".join(textwrap.wrap(label.replace(",", ", "), LABEL_CHARACTERS, break_on_hyphens=False))
