"""What a run has measured, by name, as reports show it."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fgpt_hf.errors import UserError
from fgpt_hf.training.records import METRICS, RECORD, Lines, read_metrics

MEASUREMENTS = {  # what the summary lists first, before the benchmarks
    "loss": "training loss",
    "eval_loss": "validation loss",
    "eval_bits_per_byte": "bits per byte",
    "eval_rewards/margins": "validation reward margin",
    "eval_rewards/accuracies": "validation reward accuracy",
    "answers_ended": "share of answers that end",
    "answer_tokens": "tokens per answer",
}


class Series(NamedTuple):
    """The steps at which something was measured, and its values."""

    steps: Sequence[int]
    values: Sequence[float]


def measured_lines(folder: Path) -> list[dict[str, float]]:
    """Return the lines of `metrics.jsonl`, at least one."""
    if not (folder / RECORD).is_file():
        inside = [str(record.parent) for record in sorted(folder.glob(f"*/{RECORD}"))]
        hint = f"it holds the runs {', '.join(inside)}" if inside else "give the output_dir of a training command"
        raise UserError(f"{folder} is not a run, because it has no {RECORD}: {hint}")
    metrics = read_metrics(folder)
    if not metrics:
        raise UserError(f"{folder / METRICS} has no line yet: the run has not finished its first step")
    return metrics


def benchmark_keys(metrics: Lines) -> list[str]:
    """Return the keys of benchmarks, in the order in which they were measured."""
    keys = {key: None for line in metrics for key in line if "/" in key and "rewards/" not in key}
    return [key for key in keys if not key.endswith("_stderr")]


def series(metrics: Lines, key: str) -> Series:
    """Return the values of one key, at the steps that have it."""
    measured = [(int(line["step"]), line[key]) for line in metrics if key in line]
    return Series([step for step, _ in measured], [value for _, value in measured])


def running_mean(values: Sequence[float], window: float = 0.05) -> list[float]:
    """Return each value averaged with its neighbors on both sides; `window` is a fraction of the curve's length."""
    reach = round(len(values) * window / 2)
    return [statistics.fmean(values[max(0, at - reach) : at + reach + 1]) for at in range(len(values))]


def short_number(value: float) -> str:
    """Return a number with three digits, or whole from a thousand on."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
