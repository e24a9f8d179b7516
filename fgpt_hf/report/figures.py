"""Figures of a run: losses, learning rate, gradient norm, speed and other measurements."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from fgpt_hf.report.measured import Series, benchmark_keys, measured_lines, running_mean, series, short_number
from fgpt_hf.training.records import Lines


class Figure(NamedTuple):
    """One figure: keys of `metrics.jsonl`, each with its name in the legend, and the axis.

    Attributes:
        unit: the label of the axis.
        noisy: draw many points thinly, under their running mean.
    """

    unit: str
    curves: Mapping[str, str]
    logarithmic: bool = False
    from_zero: bool = False
    noisy: bool = True


FIGURES: Mapping[str, Figure] = {
    "loss": Figure("loss, nats", {"loss": "training", "eval_loss": "validation"}),
    "bits_per_byte": Figure("bits per byte", {"eval_bits_per_byte": "held-out text"}, noisy=False),
    "learning_rate": Figure("learning rate", {"learning_rate": "learning rate"}, noisy=False),
    "gradient_norm": Figure("gradient norm before clipping", {"grad_norm": "gradient norm"}, logarithmic=True),
    "speed": Figure("tokens per second", {"tokens_per_second": "tokens per second"}, from_zero=True),
    "utilization": Figure("share of the peak", {"mfu": "model FLOPs utilization"}, from_zero=True),
    "reward_margin": Figure(
        "reward of the chosen reply minus that of the rejected one",
        {"rewards/margins": "training", "eval_rewards/margins": "validation"},
    ),
    "reward_accuracy": Figure(
        "share of pairs whose chosen reply has the higher reward",
        {"rewards/accuracies": "training", "eval_rewards/accuracies": "validation"},
        from_zero=True,
    ),
    "answer_length": Figure("tokens", {"answer_tokens": "mean length of the answers"}, from_zero=True),
    "answers_ended": Figure("share", {"answers_ended": "answers that end by themselves"}, from_zero=True),
}
MANY_POINTS = 100  # from here on, a noisy curve is drawn thinly under its running mean


def draw_figures(folder: Path) -> list[Path]:
    """Draw a run's figures into `figures/`; return their paths, one for each figure of which anything was measured.

    Benchmarks, whose keys are `task/metric`, share a figure.

    Raises:
        UserError: the folder is not a run's, or nothing has been measured in it yet.

    Example:
        >>> draw_figures(Path("runs/quickstart/base"))  # doctest: +SKIP
        [PosixPath('runs/quickstart/base/figures/loss.png'), …]
    """
    metrics = measured_lines(folder)
    (folder / "figures").mkdir(exist_ok=True)
    paths = {folder / "figures" / f"{name}.png": figure for name, figure in figures_of(metrics).items()}
    for path, figure in paths.items():
        draw_figure(metrics, figure, path)
    return list(paths)


def figures_of(metrics: Lines) -> dict[str, Figure]:
    """Return the figures of which anything was measured, by name."""
    names = {name: name for name in sorted(benchmark_keys(metrics))}
    figures = {**FIGURES, "benchmarks": Figure("share of correct answers", names)}
    return {
        name: figure for name, figure in figures.items() if any(series(metrics, key).steps for key in figure.curves)
    }


def draw_figure(metrics: Lines, figure: Figure, target: Path | TextIO) -> None:
    """Draw a figure to a path, or as SVG to a file."""
    from matplotlib.ticker import LogFormatter

    canvas, (axes,) = new_axes()
    for index, (key, name) in enumerate(figure.curves.items()):
        _draw_curve(axes, series(metrics, key), name, f"C{index}", figure.noisy)
    if figure.logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(LogFormatter())  # plain numbers, between the powers only where there is room
        axes.yaxis.set_minor_formatter(LogFormatter())
    if figure.from_zero:
        axes.set_ylim(bottom=0)
    style_axes(axes, f"step ({metrics[-1]['tokens']:,} tokens at step {metrics[-1]['step']:,})", figure.unit)
    axes.legend(frameon=False)
    save_figure(canvas, target)


def new_axes(columns: int = 1, width: float = 7, height: float = 4) -> tuple[Any, list[Any]]:
    """Return a canvas, its size in inches, with axes side by side that share their height."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(canvas)
    return canvas, list(canvas.subplots(1, columns, sharey=True, squeeze=False)[0])


def style_axes(axes: Any, horizontal: str, vertical: str) -> None:
    """Label axes, and leave out what is not needed to read them."""
    axes.set_xlabel(horizontal)
    axes.set_ylabel(vertical)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)


def save_figure(canvas: Any, target: Path | TextIO) -> None:
    """Write a canvas to a path, or as SVG to a file."""
    if isinstance(target, Path):
        canvas.savefig(target)
    else:
        canvas.savefig(target, format="svg")


def _draw_curve(axes: Any, series: Series, name: str, color: str, noisy: bool) -> None:
    """Draw the points; if they are many and noisy, thinly, with their running mean on top."""
    if not series.steps:
        return
    label = f"{name}, at the end {short_number(series.values[-1])}"
    if noisy and len(series.steps) > MANY_POINTS:
        axes.plot(*series, color=color, linewidth=0.6, alpha=0.35)
        axes.plot(series.steps, running_mean(series.values), color=color, linewidth=1.8, label=label)
    else:
        marker = "" if len(series.steps) > 30 else "o"
        axes.plot(*series, color=color, marker=marker, markersize=3, linewidth=1.5, label=label)
