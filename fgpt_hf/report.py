"""Report on a run: figures of what was measured, losses and samples before and after, and what the folder holds."""

import statistics
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from fgpt_hf.errors import UserError
from fgpt_hf.training.run_folder import read_metrics, read_samples

Lines = Sequence[Mapping[str, Any]]


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


class Series(NamedTuple):
    """The steps at which something was measured, and its values."""

    steps: Sequence[int]
    values: Sequence[float]


FIGURES: Mapping[str, Figure] = {
    "loss": Figure("loss, nats", {"loss": "training", "eval_loss": "validation"}),
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
MEASUREMENTS = {  # what the summary lists first, before the benchmarks
    "loss": "training loss",
    "eval_loss": "validation loss",
    "eval_bits_per_byte": "bits per byte",
    "eval_rewards/margins": "validation reward margin",
    "eval_rewards/accuracies": "validation reward accuracy",
    "answers_ended": "share of answers that end",
    "answer_tokens": "tokens per answer",
}
ANSWER_COLUMNS = {"prompt": 30, "before": 40, "after": 40}  # with their widths
COLUMN_GAP = "  "
MAX_LINES = 4  # of a prompt or an answer in the table
MANY_POINTS = 100  # from here on, a noisy curve is drawn thinly under its running mean
LISTED_FOLDERS = ("checkpoints", "figures")  # each entry of these is named


def summarize_run(folder: Path) -> str:
    """Return what a run has achieved so far: losses and samples before and after, files, and what to do next.

    Raises:
        UserError: the folder is not a run's, or nothing has been measured in it yet.

    Example:
        >>> print(summarize_run(Path("runs/quickstart/base")))  # doctest: +SKIP
        runs/quickstart/base: 400 steps, 819,200 tokens, 95 s of training
          training loss    10.826 at step 1 -> 4.105 at step 400
        ...
    """
    metrics = _read_metrics(folder)
    samples = read_samples(folder)
    has_answers = any("answers_ended" in line for line in metrics)
    parts = [
        _changes(folder, metrics),
        _answer_table(samples) if has_answers else _sample_lines(samples),
        _contents(folder),
    ]
    return "\n\n".join(text for text in map("\n".join, parts) if text)


def draw_figures(folder: Path) -> list[Path]:
    """Draw a run's figures into `figures/`; return their paths, one for each figure of which anything was measured.

    Benchmarks, whose keys are `task/metric`, share a figure.

    Raises:
        UserError: the folder is not a run's, or nothing has been measured in it yet.

    Example:
        >>> draw_figures(Path("runs/quickstart/base"))  # doctest: +SKIP
        [PosixPath('runs/quickstart/base/figures/loss.png'), …]
    """
    metrics = _read_metrics(folder)
    names = {name: name for name in sorted(_benchmark_keys(metrics))}
    figures = {**FIGURES, "benchmarks": Figure("share of correct answers", names)}
    (folder / "figures").mkdir(exist_ok=True)
    return [
        _draw(metrics, figure, folder / "figures" / f"{name}.png")
        for name, figure in figures.items()
        if any(_series(metrics, key).steps for key in figure.curves)
    ]


def _read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of `metrics.jsonl`, at least one."""
    if not (folder / "run.yaml").is_file():
        inside = [str(record.parent) for record in sorted(folder.glob("*/run.yaml"))]
        hint = f"it holds the runs {', '.join(inside)}" if inside else "give the output_dir of a training command"
        raise UserError(f"{folder} is not a run, because it has no run.yaml: {hint}")
    metrics = read_metrics(folder)
    if not metrics:
        raise UserError(f"{folder / 'metrics.jsonl'} has no line yet: the run has not finished its first step")
    return metrics


def _benchmark_keys(metrics: Lines) -> list[str]:
    """Return the keys of benchmarks, in the order in which they were measured."""
    keys = {key: None for line in metrics for key in line if "/" in key and "rewards/" not in key}
    return [key for key in keys if not key.endswith("_stderr")]


def _series(metrics: Lines, key: str) -> Series:
    measured = [(line["step"], line[key]) for line in metrics if key in line]
    return Series([step for step, _ in measured], [value for _, value in measured])


def _draw(metrics: Lines, figure: Figure, path: Path) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas
    from matplotlib.ticker import LogFormatter

    canvas = Canvas(figsize=(7, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(canvas)
    axes = canvas.add_subplot()
    for index, (key, name) in enumerate(figure.curves.items()):
        _draw_curve(axes, _series(metrics, key), name, f"C{index}", figure.noisy)
    axes.set_xlabel(f"step ({metrics[-1]['tokens']:,} tokens at step {metrics[-1]['step']:,})")
    axes.set_ylabel(figure.unit)
    if figure.logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(LogFormatter())  # plain numbers, between the powers only where there is room
        axes.yaxis.set_minor_formatter(LogFormatter())
    if figure.from_zero:
        axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    canvas.savefig(path)
    return path


def _draw_curve(axes: Any, series: Series, name: str, color: str, noisy: bool) -> None:
    """Draw the points; if they are many and noisy, thinly, with their running mean on top."""
    if not series.steps:
        return
    label = f"{name}, at the end {_short(series.values[-1])}"
    if noisy and len(series.steps) > MANY_POINTS:
        axes.plot(*series, color=color, linewidth=0.6, alpha=0.35)
        axes.plot(series.steps, _running_mean(series.values), color=color, linewidth=1.8, label=label)
    else:
        marker = "" if len(series.steps) > 30 else "o"
        axes.plot(*series, color=color, marker=marker, markersize=3, linewidth=1.5, label=label)


def _running_mean(values: Sequence[float], window: float = 0.05) -> list[float]:
    """Return each value averaged with its neighbors on both sides; `window` is a fraction of the curve's length."""
    reach = round(len(values) * window / 2)
    return [statistics.fmean(values[max(0, at - reach) : at + reach + 1]) for at in range(len(values))]


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _changes(folder: Path, metrics: Lines) -> Iterator[str]:
    """Yield the first and the last value of each loss and benchmark, and the speed."""
    last = metrics[-1]
    yield f"{folder}: {last['step']:,} steps, {last['tokens']:,} tokens, {last['seconds']:,.0f} s of training"
    candidates = MEASUREMENTS | {key: key for key in _benchmark_keys(metrics)}
    names = {key: name for key, name in candidates.items() if _series(metrics, key).steps}
    width = max(map(len, (*names.values(), "speed")))
    for key, name in names.items():
        steps, values = _series(metrics, key)
        errors = _series(metrics, f"{key}_stderr").values
        error = f" ± {errors[-1]:.3f}" if errors else ""
        yield (f"  {name:<{width}}  {values[0]:.3f} at step {steps[0]} -> {values[-1]:.3f}{error} at step {steps[-1]}")
    if speeds := _series(metrics, "tokens_per_second").values:
        yield f"  {'speed':<{width}}  {statistics.median(speeds):,.0f} tokens/s (median)"
    if last.get("skipped_steps"):
        yield f"  {last['skipped_steps']} steps were skipped: a non-finite gradient, or a batch without labels"


def _sample_lines(samples: Lines) -> Iterator[str]:
    """Yield what the model wrote at the first and at the last step that has samples."""
    for step in sorted({samples[0]["step"], samples[-1]["step"]} if samples else ()):
        yield f"samples after {step:,} steps:"
        for line in samples:
            if line["step"] == step:
                yield f"  {line['prompt']!r} ... {line['sampled'][:160]!r}"


def _answer_table(samples: Lines) -> Iterator[str]:
    """Yield a table of the greedy answers at the first and at the last step that has any, prompt by prompt."""
    if not samples:
        return
    steps = samples[0]["step"], samples[-1]["step"]
    before, after = ({line["prompt"]: line["greedy"] for line in samples if line["step"] == step} for step in steps)
    yield f"greedy answers before training, and after {steps[1]:,} steps (sampled ones are in samples.jsonl):"
    yield from _table_row(ANSWER_COLUMNS)
    for prompt, answer in after.items():
        yield COLUMN_GAP.join("-" * width for width in ANSWER_COLUMNS.values())
        yield from _table_row((prompt, before.get(prompt, ""), answer))


def _table_row(cells: Iterable[str]) -> Iterator[str]:
    """Yield the lines of a row, each cell wrapped to its width, `MAX_LINES` at most."""
    columns = [
        textwrap.wrap(" ".join(cell.split()), width, max_lines=MAX_LINES, placeholder=" …") or [""]
        for cell, width in zip(cells, ANSWER_COLUMNS.values(), strict=True)
    ]
    for parts in zip_longest(*columns, fillvalue=""):
        padded = (f"{part:<{width}}" for part, width in zip(parts, ANSWER_COLUMNS.values(), strict=True))
        yield COLUMN_GAP.join(padded).rstrip()


def _contents(folder: Path) -> Iterator[str]:
    """Yield what the folder holds, and the commands to continue with."""
    yield f"{folder} holds"
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            listed = path.name in LISTED_FOLDERS
            inside = ", ".join(sorted(child.name for child in path.iterdir())) if listed else ""
            yield f"  {path.name + '/':<16}{size / 1e6:>9.3f} MB  {inside}".rstrip()
        else:
            yield f"  {path.name:<16}{path.stat().st_size / 1e6:>9.3f} MB"
    yield ""
    if (folder / "model").is_dir():
        loading = f"AutoModelForCausalLM.from_pretrained({str(folder / 'model')!r}, trust_remote_code=True)"
        yield f"load the model:        {loading}"
        yield f"preview its upload:    fgpt publish {folder} user/name --dry_run"
    yield f"update this report:    fgpt report {folder}"
    resume = f"--config {folder}/run.yaml --output_dir {folder} --resume_from_checkpoint latest"
    yield f"train for more steps:  the same training command with {resume} --max_steps N"
