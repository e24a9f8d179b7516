"""Compare several runs: one table, and their curves over steps, tokens and hours."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from fgpt_hf.config.runs import BaseRun, kind_of_run
from fgpt_hf.errors import UserError
from fgpt_hf.evaluation.tasks import TASKS
from fgpt_hf.files import read_json
from fgpt_hf.model.configuration_fgpt import FGPTConfig
from fgpt_hf.model.shapes import shape_of
from fgpt_hf.parsing import as_type
from fgpt_hf.report.figures import new_axes, save_figure, style_axes
from fgpt_hf.report.measured import measured_lines, running_mean, series
from fgpt_hf.runtime.duration import duration
from fgpt_hf.runtime.network import count_parameters, network_config
from fgpt_hf.training.records import RECORD, Lines, read_record

NOTHING = "–"
GAP = "  "
MOST_RUNS = 20  # beyond which neither colors nor rows can be told apart


class Axis(NamedTuple):
    """What curves are drawn against: a key of `metrics.jsonl`, its label, and what its values are divided by."""

    key: str
    label: str
    divisor: float = 1.0


HOURS, MINUTES = Axis("seconds", "hours of training", 3600.0), Axis("seconds", "minutes of training", 60.0)


@dataclass(frozen=True)
class ComparedRun:
    """A run in a comparison.

    Attributes:
        name: what tells it from the others: its folder, without the part that all of them share.
        recorded: the options in its `run.yaml`.
        metrics: the lines of its `metrics.jsonl`.
        config: the shape of its network, if a model or its options tell it.
    """

    name: str
    folder: Path
    recorded: Mapping[str, Any]
    metrics: Lines
    config: PreTrainedConfig | None = None

    def last(self, key: str) -> float | None:
        """Return the last value that was measured, or None."""
        values = series(self.metrics, key).values
        return values[-1] if values else None


COLUMNS: Mapping[str, Callable[[ComparedRun], str]] = {
    "run": lambda run: run.name,
    "stage": lambda run: kind_of_run(run.recorded).stage,
    "data": lambda run: _short_data(str(run.recorded.get("dataset_name", NOTHING))),
    "shape": lambda run: _shape(run.config),
    "parameters": lambda run: f"{count_parameters(run.config).total / 1e6:,.1f}M" if run.config else NOTHING,
    "steps": lambda run: f"{run.metrics[-1]['step']:,}",
    "tokens": lambda run: _large(run.metrics[-1]["tokens"]),
    "time": lambda run: duration(run.metrics[-1]["seconds"]),
    "validation loss": lambda run: _number(run.last("eval_loss")),
    "bits per byte": lambda run: _number(run.last("eval_bits_per_byte")),
    "reward accuracy": lambda run: _number(run.last("eval_rewards/accuracies")),
    "answers that end": lambda run: _number(run.last("answers_ended")),
}


def read_runs(folders: Sequence[Path]) -> list[ComparedRun]:
    """Return the runs in these folders.

    Raises:
        UserError: one of them is not a run, or has measured nothing yet; one is named twice; or they are too many.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("a run is named twice: a comparison needs each of them once")
    if len(folders) > MOST_RUNS:
        raise UserError(f"{len(folders)} runs are too many for one table and figure: compare up to {MOST_RUNS}")
    names = _names(folders)
    return [_read_run(name, folder) for name, folder in zip(names, folders, strict=True)]


def comparison_table(runs: Sequence[ComparedRun]) -> list[list[str]]:
    """Return the cells of the table, its header first; columns in which no run has a value are left out."""
    columns = {**COLUMNS, **{name: _result_column(key) for name, key in _benchmarks(runs).items()}}
    cells = {name: [value_of(run) for run in runs] for name, value_of in columns.items()}
    shown = {name: values for name, values in cells.items() if set(values) != {NOTHING}}
    return [list(shown), *(list(row) for row in zip(*shown.values(), strict=True))]


def format_table(cells: Sequence[Sequence[str]]) -> str:
    """Return a table as text, its first column to the left and the numbers to the right.

    Example:
        >>> print(format_table([["run", "loss"], ["a", "4.5"], ["longer", "10.5"]]))
        run     loss
        a        4.5
        longer  10.5
    """
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        first, *others = zip(row, widths, strict=True)
        lines.append(GAP.join([f"{first[0]:<{first[1]}}", *(f"{cell:>{width}}" for cell, width in others)]).rstrip())
    return "\n".join(lines)


def draw_comparison(runs: Sequence[ComparedRun], target: Path | TextIO) -> None:
    """Draw the losses of several runs over steps, tokens and hours, to a path or as SVG to a file.

    Of runs with different vocabularies, whose losses per token do not compare, the bits per byte are drawn instead.
    """
    from matplotlib.ticker import EngFormatter, MaxNLocator

    longest = max(run.metrics[-1]["seconds"] for run in runs)
    axes = (Axis("step", "steps"), Axis("tokens", "tokens"), HOURS if longest > 2 * HOURS.divisor else MINUTES)
    canvas, panels = new_axes(columns=len(axes), width=13)
    alike = len({run.config.vocab_size for run in runs if run.config}) < 2
    draw, label = (_draw_losses, "loss, nats") if alike else (_draw_bits, "bits per byte of held-out text")
    for axis, panel in zip(axes, panels, strict=True):
        for index, run in enumerate(runs):
            draw(panel, axis, run, f"C{index % 10}")
        style_axes(panel, axis.label, label if panel is panels[0] else "")
        panel.xaxis.set_major_locator(MaxNLocator(5))
        if axis.divisor == 1:
            panel.xaxis.set_major_formatter(EngFormatter(sep=""))  # 50k, 2M
    panels[-1].legend(frameon=False, fontsize="small")
    save_figure(canvas, target)


def _draw_losses(panel: Any, axis: Axis, run: ComparedRun, color: str) -> None:
    """Draw a run's training loss thinly under its validation loss, or alone."""
    x_of_step = _x_of_step(axis, run)
    training, validation = (series(run.metrics, key) for key in ("loss", "eval_loss"))
    if training.steps:
        smooth = running_mean(training.values)
        alone = not validation.steps
        panel.plot(
            [x_of_step[step] for step in training.steps],
            smooth,
            color=color,
            linewidth=1.5 if alone else 0.8,
            alpha=1.0 if alone else 0.4,
            label=run.name if alone else None,
        )
    if validation.steps:
        xs = [x_of_step[step] for step in validation.steps]
        panel.plot(xs, validation.values, color=color, marker="o", markersize=3, label=run.name)


def _draw_bits(panel: Any, axis: Axis, run: ComparedRun, color: str) -> None:
    x_of_step, measured = _x_of_step(axis, run), series(run.metrics, "eval_bits_per_byte")
    panel.plot([x_of_step[step] for step in measured.steps], measured.values, color=color, marker="o", label=run.name)


def _x_of_step(axis: Axis, run: ComparedRun) -> dict[int, float]:
    """Return where on an axis each measured step is."""
    return {int(line["step"]): line[axis.key] / axis.divisor for line in run.metrics}


def _read_run(name: str, folder: Path) -> ComparedRun:
    metrics, recorded = measured_lines(folder), read_record(folder / RECORD)
    return ComparedRun(name, folder, recorded, metrics, _config(folder, recorded))


def _config(folder: Path, recorded: Mapping[str, Any]) -> PreTrainedConfig | None:
    """Return the shape of a run's network, from its model, its last checkpoint or its options."""
    files = [folder / "model" / "config.json", *sorted(folder.glob("checkpoints/step_*/config.json"), reverse=True)]
    found = next((path for path in files if path.is_file()), None)
    try:
        if found is not None:
            fields = as_type(dict[str, Any], read_json(found))
            kind = str(fields.get("model_type", FGPTConfig.model_type))
            return AutoConfig.for_model(**{**fields, "model_type": kind}) if kind in CONFIG_MAPPING else None
        is_new = "hidden_size" in recorded and not recorded.get("model_name_or_path")
        return network_config(as_type(BaseRun, recorded)) if is_new else None
    except (ValueError, TypeError) as error:
        raise UserError(f"{found or folder / RECORD} is damaged: {error}") from error


def _names(folders: Sequence[Path]) -> list[str]:
    """Return the folders without the part that all of them begin with."""
    if len(folders) == 1:
        return [str(folders[0])]
    shared = Path(os.path.commonpath([folder.resolve() for folder in folders]))
    return [folder.resolve().relative_to(shared).as_posix() or folder.name for folder in folders]


def _benchmarks(runs: Sequence[ComparedRun]) -> dict[str, str]:
    """Return the key of each benchmark's headline metric, by the benchmark's name."""
    measured = {key: None for run in runs for line in run.metrics for key in line if "/" in key}
    keys = {name: f"{name}/{task.headline_metric}" for name, task in TASKS.items()}
    return {name: key for name, key in keys.items() if key in measured}


def _result_column(key: str) -> Callable[[ComparedRun], str]:
    def cell(run: ComparedRun) -> str:
        value, error = run.last(key), run.last(f"{key}_stderr")
        return _number(value) + (f" ± {error:.3f}" if error is not None else "")

    return cell


def _number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3f}"


def _large(number: float) -> str:
    """Return a number of tokens with three digits.

    Example:
        >>> _large(327_680), _large(2_516_582_400), _large(512)
        ('328K', '2.52B', '512')
    """
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return f"{number:.0f}"


def _shape(config: PreTrainedConfig | None) -> str:
    if config is None:
        return NOTHING
    shape = shape_of(config)
    return f"{shape.num_hidden_layers} x {shape.hidden_size}, {shape.max_position_embeddings} tokens"


def _short_data(name: str) -> str:
    """Return a dataset's name without its folders, at most 30 characters."""
    text = ",".join(entry.rstrip("/").rpartition("/")[2] if "/" in entry else entry for entry in name.split(","))
    return text if len(text) <= 30 else f"{text[:28]} …"
