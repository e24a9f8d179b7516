"""Results of benchmarks as tables, JSON, and what a model's card says of them."""

import json
import math
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from fgpt_hf.evaluation.benchmark import TaskResult
from fgpt_hf.evaluation.tasks import HubSource, find_task
from fgpt_hf.metrics.hellaswag.hellaswag import mean

CONVENTIONS = {
    "acc": "choice: the ending with the greatest sum of log-likelihoods; last word: whether it is written greedily; "
    "letter: whether the letter written is the right one",
    "acc_norm": "the sum divided by the ending's length in characters (lm-evaluation-harness)",
    "acc_bytes": "the sum divided by the ending's length in UTF-8 bytes (lm-evaluation-harness)",
    "acc_token": "the sum divided by the ending's tokens, encoded apart from the context (Karpathy's scripts)",
    "answered": "the share of the replies that name one of the letters",
    "loss": "nats per token of the whole corpus",
    "perplexity": "the exponential of the mean loss per token, or per last word",
    "bits_per_byte": "bits per UTF-8 byte of the whole corpus, windows without overlap (lm-evaluation-harness)",
    "word_perplexity": "the exponential of the nats per white-space separated word",
}

PACKAGES = ("fgpt-hf", "torch", "transformers", "tokenizers", "accelerate", "datasets")


class Difference(NamedTuple):
    """How much higher the second of two models reads at one measure, and the standard error of that."""

    task: str
    measure: str
    first: float
    second: float
    error: float

    @property
    def value(self) -> float:
        return self.second - self.first

    def as_json(self) -> dict[str, Any]:
        error = None if math.isnan(self.error) else self.error  # of one example; JSON has no NaN
        return {**self._asdict(), "error": error, "difference": self.value}


def differences(first: Sequence[TaskResult], second: Sequence[TaskResult]) -> list[Difference]:
    """Two models on the same examples, measure by measure.

    The error is that of the mean of the differences example by example: it leaves out how hard the examples are, so it
    is smaller than what the errors of the two results suggest.
    """
    found = []
    for one, other in zip(first, second, strict=True):
        for measure in (measure for measure in one.shares if measure in other.shares):
            pairs = list(zip(one.shares[measure], other.shares[measure], strict=True))
            paired = mean("difference", [b - a for a, b in pairs])
            error = paired.get("difference_stderr", math.nan)
            found.append(Difference(one.task, measure, one.values[measure], other.values[measure], error))
    return found


def results_table(results: Sequence[TaskResult]) -> str:
    """A line for each measure: the result, its standard error, and how many examples it comes from."""
    lines = [("task", "examples", "measure", "result", "± error")]
    for result in results:
        values = result.values
        for measure in result.shares:
            error = values.get(f"{measure}_stderr")
            lines.append((result.task, f"{result.examples:,}", measure, _number(values[measure]), _number(error)))
    return _aligned(lines)


def differences_table(names: Sequence[str], found: Sequence[Difference]) -> str:
    """A line for each measure: the first model, the second, and how much higher the second reads."""
    lines = [("task", "measure", *names, "difference", "± error")]
    for row in found:
        values = (row.first, row.second, row.value, row.error)
        lines.append((row.task, row.measure, *map(_number, values)))
    return _aligned(lines)


def cut_notes(results: Mapping[str, Sequence[TaskResult]]) -> list[str]:
    """A line for each task whose contexts were longer than what a model reads."""
    return [
        f"{result.task}: {result.cut} contexts, counted once for each ending, were longer than {name} reads and lost "
        "their beginning"
        for name, run in results.items()
        for result in run
        if result.cut
    ]


def as_json(results: Sequence[TaskResult], settings: Mapping[str, Any], limit: int | None = None) -> dict[str, Any]:
    """Everything that a reader needs to trust one model's numbers, or to get them again.

    `tasks` maps a task to its measures, `datasets` those tasks that went through a whole data set of the Hub to it,
    `conventions` a measure to what it means: what a run's `results.json` holds for its card.
    """
    measures = {measure for result in results for measure in result.shares}
    return {
        "harness": "fgpt-hf",
        "settings": {**settings, "limit": limit},
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "conventions": {name: text for name, text in CONVENTIONS.items() if name in measures},
        "tasks": {result.task: result.values for result in results},
        "datasets": {
            result.task: {
                "id": source.path,
                "config": source.configuration,
                "task_id": result.task,
                "split": source.split,
            }
            for result in results
            if limit is None and (source := _hub_source(result))
        },
        "runs": {
            result.task: {
                "examples": result.examples,
                "contexts_cut": result.cut,
                "seconds": round(result.seconds, 3),
                "examples_per_second": round(result.examples / result.seconds, 3),
                "known_by": result.metric,
            }
            for result in results
        },
    }


def write_results(path: Path, content: Mapping[str, Any]) -> None:
    """Write what `as_json` gave, or several models' of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"  # this package itself, run from its repository


def _hub_source(result: TaskResult) -> HubSource | None:
    """The data set on the Hub that a result comes from, if any."""
    name, _, file = result.task.partition("=")
    source = find_task(name).source
    return source if isinstance(source, HubSource) and not file else None


def _number(value: float | None) -> str:
    if value is None or math.isnan(value):
        return ""
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.4g}"


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
