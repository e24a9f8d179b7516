"""Results of benchmarks as tables, as a paired comparison of two models, and as JSON."""

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fgpt_hf.evaluation.benchmark import TaskResult, mean_and_stderr
from fgpt_hf.evaluation.tasks import HubSource, find_task
from fgpt_hf.parsing import as_type

CONVENTIONS = {
    "acc": "choice: the ending with the greatest sum of log-likelihoods; last word: whether it is written greedily; "
    "letter: whether the letter written is the right one",
    "acc_norm": "the sum divided by the ending's length in characters (lm-evaluation-harness)",
    "acc_bytes": "the sum divided by the ending's length in UTF-8 bytes (lm-evaluation-harness)",
    "acc_token": "the sum divided by the ending's tokens, encoded apart from the context (Karpathy's scripts)",
    "exact_match": "the share of the greedy replies that are the answer, apart from white space around it",
    "answered": "the share of the replies that name one of the letters",
    "loss": "nats per token of the whole corpus",
    "perplexity": "the exponential of the mean loss per token, or per last word",
    "bits_per_byte": "bits per UTF-8 byte of the whole corpus, windows without overlap (lm-evaluation-harness)",
    "word_perplexity": "the exponential of the nats per white-space separated word",
}

PACKAGES = ("fgpt-hf", "torch", "transformers", "tokenizers", "accelerate", "datasets")


@dataclass(frozen=True)
class Difference:
    """How much higher the second of two models scores on one metric, with the standard error of that difference."""

    task: str
    metric: str
    first: float
    second: float
    stderr: float | None

    @property
    def value(self) -> float:
        """The second model's result minus the first one's."""
        return self.second - self.first

    def to_json(self) -> dict[str, Any]:
        """Return the record as it stands in a results file."""
        return {**asdict(self), "difference": self.value}


def differences(first: Sequence[TaskResult], second: Sequence[TaskResult]) -> list[Difference]:
    """Compare two models on the same examples, metric by metric.

    The standard error is that of the mean of the differences example by example. The difficulty of the examples cancels
    out, so it is smaller than the errors of the two results suggest.
    """
    found = []
    for one, other in zip(first, second, strict=True):
        for metric in (metric for metric in one.scores if metric in other.scores):
            pairs = zip(one.scores[metric], other.scores[metric], strict=True)
            _, stderr = mean_and_stderr([b - a for a, b in pairs])
            found.append(Difference(one.task, metric, one.metrics[metric], other.metrics[metric], stderr))
    return found


def results_table(results: Sequence[TaskResult]) -> str:
    """Return a line for each metric: the result, its standard error, and the number of examples."""
    lines = [("task", "examples", "metric", "result", "± error")]
    for result in results:
        metrics = result.metrics
        for name in result.scores:
            error = metrics.get(f"{name}_stderr")
            lines.append((result.task, f"{result.examples:,}", name, _number(metrics[name]), _number(error)))
    return _aligned(lines)


def differences_table(names: Sequence[str], found: Sequence[Difference]) -> str:
    """Return a line for each metric: the first model, the second, and how much higher the second scores."""
    lines = [("task", "metric", *names, "difference", "± error")]
    for row in found:
        values = (row.first, row.second, row.value, row.stderr)
        lines.append((row.task, row.metric, *map(_number, values)))
    return _aligned(lines)


def contexts_cut_notes(results: Mapping[str, Sequence[TaskResult]]) -> list[str]:
    """Return a line for each task with contexts longer than a model reads; `results` are by the model's name."""
    return [
        f"{result.task}: {result.contexts_cut} contexts, counted once for each ending, were longer than {name} reads "
        "and lost their beginning"
        for name, model_results in results.items()
        for result in model_results
        if result.contexts_cut
    ]


@dataclass(frozen=True)
class TaskDataset:
    """A dataset of the Hub that a task went through as a whole."""

    id: str
    task_id: str
    config: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class TaskRun:
    """How a task was evaluated."""

    examples: int
    contexts_cut: int
    seconds: float
    examples_per_second: float
    headline_metric: str


@dataclass(frozen=True)
class ResultsRecord:
    """A model's results with all that a reader needs to trust and to reproduce them: the content of `results.json`.

    Only `tasks` must be given.

    Attributes:
        settings: options of the evaluation, with `limit`, the most examples of a task.
        versions: by package.
        conventions: by metric, what it means.
        tasks: by task, its metrics with standard errors.
        datasets: by task, the dataset of the Hub that it went through as a whole.
        runs: by task, how it was evaluated.
    """

    tasks: Mapping[str, Mapping[str, float]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    conventions: Mapping[str, str] = field(default_factory=dict)
    datasets: Mapping[str, TaskDataset] = field(default_factory=dict)
    runs: Mapping[str, TaskRun] = field(default_factory=dict)
    harness: str = "fgpt-hf"

    def to_json(self) -> dict[str, Any]:
        """Return the record as it stands in `results.json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "ResultsRecord":
        """Return the record that `to_json` gave; raise UserError if the content is of another form.

        Example:
            >>> record = ResultsRecord(tasks={"hellaswag": {"acc": 0.3}})
            >>> ResultsRecord.from_json(record.to_json()) == record
            True
        """
        return as_type(cls, content)


def results_record(
    results: Sequence[TaskResult], settings: Mapping[str, Any], limit: int | None = None
) -> ResultsRecord:
    """Return the record of one model's results; `limit` is the most examples of a task that were taken."""
    metrics = {metric for result in results for metric in result.scores}
    return ResultsRecord(
        settings={**settings, "limit": limit},
        versions=package_versions(),
        conventions={name: text for name, text in CONVENTIONS.items() if name in metrics},
        tasks={result.task: result.metrics for result in results},
        datasets={} if limit is not None else {task: found for task, found in map(_hub_dataset, results) if found},
        runs={result.task: _task_run(result) for result in results},
    )


def write_results(path: Path, content: Mapping[str, Any]) -> None:
    """Write a record's JSON, or that of several models, to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def package_versions() -> dict[str, str]:
    """Return the version of Python and of the packages that a result depends on, as far as they are installed."""
    found = {"Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # this package itself, run from its repository
            continue
    return found


def _task_run(result: TaskResult) -> TaskRun:
    return TaskRun(
        examples=result.examples,
        contexts_cut=result.contexts_cut,
        seconds=round(result.seconds, 3),
        examples_per_second=round(result.examples / result.seconds, 3),
        headline_metric=result.headline_metric,
    )


def _hub_dataset(result: TaskResult) -> tuple[str, TaskDataset | None]:
    """Return the task's name and its dataset, unless the examples came from elsewhere than the Hub."""
    name, _, file = result.task.partition("=")
    source = find_task(name).source
    if file or not isinstance(source, HubSource):
        return result.task, None
    return result.task, TaskDataset(source.path, result.task, source.configuration, source.split)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.4g}"


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
