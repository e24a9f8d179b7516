"""What a run has come to, for a person: figures, losses and samples before and after, and what the folder holds."""

import statistics
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from fgpt_hf.errors import UserError
from fgpt_hf.files import read_json_lines

Lines = Sequence[Mapping[str, Any]]


class Figure(NamedTuple):
    """What a figure shows: keys of `metrics.jsonl`, each with what to call it, and its axis."""

    unit: str
    curves: Mapping[str, str]
    logarithmic: bool = False
    from_zero: bool = False
    noisy: bool = True


FIGURES: Mapping[str, Figure] = {
    "loss": Figure("loss, nats", {"loss": "training", "eval_loss": "held out"}),
    "learning_rate": Figure("learning rate", {"learning_rate": "learning rate"}, noisy=False),
    "gradient_norm": Figure("norm of the gradient before clipping", {"grad_norm": "gradient norm"}, logarithmic=True),
    "speed": Figure("tokens per second", {"tokens_per_second": "tokens per second"}, from_zero=True),
    "utilisation": Figure("share of the peak", {"mfu": "model FLOPs utilisation"}, from_zero=True),
    "reward_margin": Figure(
        "reward of the chosen reply less that of the rejected one",
        {"rewards/margins": "training", "eval_rewards/margins": "held out"},
    ),
    "pairs_right": Figure(
        "share of pairs whose chosen reply has the greater reward",
        {"rewards/accuracies": "training", "eval_rewards/accuracies": "held out"},
        from_zero=True,
    ),
    "answer_length": Figure("tokens", {"answer_tokens": "mean length of the answers"}, from_zero=True),
    "answers_ended": Figure("share", {"answers_ended": "answers that end by themselves"}, from_zero=True),
}
LOSSES = {
    "loss": "training loss",
    "eval_loss": "held-out loss",
    "eval_bits_per_byte": "bits per byte",
    "eval_rewards/margins": "held-out reward margin",
    "eval_rewards/accuracies": "held-out pairs right",
    "answers_ended": "share of answers that end",
    "answer_tokens": "tokens of an answer",
}
ANSWERS = {"prompt": 30, "before": 40, "after": 40}  # columns of the table, with their widths
MAX_LINES = 4  # of a prompt or an answer in it
LISTED = ("checkpoints", "figures")  # folders of which each entry is named


def report(folder: Path) -> str:
    """Draw a run's figures into `figures/`, and tell what came of it.

    Raises:
        UserError: the folder is no run's, or nothing has been measured in it yet.
    """
    metrics = _metrics(folder)
    draw(metrics, folder / "figures")
    samples = read_json_lines(folder / "samples.jsonl")
    has_answers = any("answers_ended" in line for line in metrics)
    parts = [_losses(folder, metrics), (_answers if has_answers else _samples)(samples), _contents(folder)]
    return "\n\n".join("\n".join(part) for part in parts if part)


def draw(metrics: Lines, folder: Path) -> list[Path]:
    """A PNG for each figure of which anything was measured; benchmarks, whose keys are `task/measure`, share one."""
    names = {name: name for name in sorted(_measures(metrics))}
    figures = {**FIGURES, "benchmarks": Figure("share of right answers", names)}
    folder.mkdir(exist_ok=True)
    return [
        _draw(metrics, figure, folder / f"{name}.png")
        for name, figure in figures.items()
        if any(_series(metrics, key)[0] for key in figure.curves)
    ]


def _measures(metrics: Lines) -> list[str]:
    """The keys of benchmarks, in the order in which they were measured."""
    keys = {key: None for line in metrics for key in line if "/" in key and "rewards/" not in key}
    return [key for key in keys if not key.endswith("_stderr")]


def _draw(metrics: Lines, figure: Figure, path: Path) -> Path:
    """One figure: measured points thin where there are many, their running mean over them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas
    from matplotlib.ticker import LogFormatter

    canvas = Canvas(figsize=(7, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(canvas)
    axes = canvas.add_subplot()
    for number, (key, name) in enumerate(figure.curves.items()):
        steps, values = _series(metrics, key)
        if not steps:
            continue
        label, color = f"{name}, at the end {_short(values[-1])}", f"C{number}"
        many = figure.noisy and len(steps) > 100
        marker = "" if len(steps) > 30 else "o"
        axes.plot(
            steps,
            values,
            color=color,
            marker=marker,
            markersize=3,
            linewidth=0.6 if many else 1.5,
            alpha=0.35 if many else 1.0,
            label=None if many else label,
        )
        if many:
            axes.plot(steps, _running_mean(values), color=color, linewidth=1.8, label=label)
    axes.set_xlabel(f"step ({metrics[-1]['tokens']:,} tokens at step {metrics[-1]['step']:,})")
    axes.set_ylabel(figure.unit)
    if figure.logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(LogFormatter())  # plain numbers, and between the powers only where there is room
        axes.yaxis.set_minor_formatter(LogFormatter())
    if figure.from_zero:
        axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    canvas.savefig(path)
    return path


def _series(metrics: Lines, key: str) -> tuple[list[int], list[float]]:
    """The steps at which a key was measured, and what it was."""
    measured = [(line["step"], line[key]) for line in metrics if key in line]
    return [step for step, _ in measured], [value for _, value in measured]


def _running_mean(values: Sequence[float], share: float = 0.05) -> list[float]:
    """Each value averaged with its neighbours, a twentieth of the curve in all, so that no bend comes late."""
    reach = round(len(values) * share / 2)
    return [statistics.fmean(values[max(0, at - reach) : at + reach + 1]) for at in range(len(values))]


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _losses(folder: Path, metrics: Lines) -> Iterator[str]:
    """What was first and last measured of each loss and benchmark, and the speed."""
    last = metrics[-1]
    yield f"{folder}: {last['step']:,} steps, {last['tokens']:,} tokens, {last['seconds']:,.0f} s of training"
    named = LOSSES | {key: key for key in _measures(metrics)}
    names = {key: name for key, name in named.items() if _series(metrics, key)[0]}
    width = max(map(len, (*names.values(), "speed")))
    for key, name in names.items():
        steps, values = _series(metrics, key)
        error = _series(metrics, f"{key}_stderr")[1]
        doubt = f" ± {error[-1]:.3f}" if error else ""
        first, now = f"{values[0]:.3f} at step {steps[0]}", f"{values[-1]:.3f}{doubt} at step {steps[-1]}"
        yield f"  {name:<{width}}  {first} -> {now}"
    speeds = _series(metrics, "tokens_per_second")[1]
    if speeds:
        yield f"  {'speed':<{width}}  {statistics.median(speeds):,.0f} tokens/s (median)"
    if last.get("skipped_steps"):
        yield f"  {last['skipped_steps']} steps were skipped: they had no finite gradient or no scored token"


def _samples(samples: Lines) -> Iterator[str]:
    """What the model wrote at the first and at the last step that has samples."""
    for step in sorted({samples[0]["step"], samples[-1]["step"]} if samples else ()):
        yield f"after {step:,} steps it writes:"
        for line in samples:
            if line["step"] == step:
                yield f"  {line['prompt']!r} ... {line['sampled'][:160]!r}"


def _answers(samples: Lines) -> Iterator[str]:
    """A table of the likeliest answers at the first and at the last step that has any, prompt by prompt."""
    if not samples:
        return
    steps = samples[0]["step"], samples[-1]["step"]
    before, after = ({line["prompt"]: line["greedy"] for line in samples if line["step"] == step} for step in steps)
    yield f"its likeliest answers before, and after {steps[1]:,} steps (samples.jsonl has sampled ones too):"
    yield from _table_row(ANSWERS)
    for prompt, answer in after.items():
        yield _BETWEEN.join("-" * width for width in ANSWERS.values())
        yield from _table_row((prompt, before.get(prompt, ""), answer))


_BETWEEN = "  "


def _table_row(cells: Iterable[str]) -> Iterator[str]:
    """The lines of a row, each cell in as many as its width needs, up to `MAX_LINES`."""
    columns = [
        textwrap.wrap(" ".join(cell.split()), width, max_lines=MAX_LINES, placeholder=" …") or [""]
        for cell, width in zip(cells, ANSWERS.values(), strict=True)
    ]
    for parts in zip_longest(*columns, fillvalue=""):
        yield _BETWEEN.join(f"{part:<{width}}" for part, width in zip(parts, ANSWERS.values(), strict=True)).rstrip()


def _contents(folder: Path) -> Iterator[str]:
    """What the folder holds, and how to go on from there."""
    yield f"{folder} holds"
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            files = [file for file in path.rglob("*") if file.is_file()]
            inside = ", ".join(sorted(child.name for child in path.iterdir())) if path.name in LISTED else ""
            size = sum(file.stat().st_size for file in files)
            yield f"  {path.name + '/':<16}{size / 1e6:>9.3f} MB  {inside}".rstrip()
        else:
            yield f"  {path.name:<16}{path.stat().st_size / 1e6:>9.3f} MB"
    yield ""
    if (folder / "model").is_dir():
        yield f"the model: AutoModelForCausalLM.from_pretrained({str(folder / 'model')!r}, trust_remote_code=True)"
        yield f"on the Hub, what would go there first: fgpt publish {folder} user/name --dry_run"
    yield f"these figures again, as the run goes: fgpt report {folder}"
    go_on = f"--config {folder}/run.yaml --output_dir {folder} --resume_from_checkpoint latest"
    yield f"to go on with more steps, the same script with: {go_on} --max_steps N"


def _metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`, at least one."""
    if not (folder / "run.yaml").is_file():
        inside = [str(record.parent) for record in sorted(folder.glob("*/run.yaml"))]
        hint = (
            f"it holds the runs {', '.join(inside)}"
            if inside
            else "that is what a training script writes to output_dir"
        )
        raise UserError(f"{folder} is no run, since it has no run.yaml: {hint}")
    metrics = read_json_lines(folder / "metrics.jsonl")
    if not metrics:
        raise UserError(f"{folder / 'metrics.jsonl'} has no line yet: the run's first step has not been reached")
    return metrics
