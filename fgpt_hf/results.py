"""Results of benchmarks as tables, JSON, and what a model's card says of them."""

import json
import math
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, eval_result_entries_to_yaml

from fgpt_hf.evaluation import TaskResult
from fgpt_hf.metrics.hellaswag.hellaswag import mean
from fgpt_hf.tasks import HubSource, find_task

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
        return {**self._asdict(), "difference": self.value}


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
            result.task: {"id": source.path, "task_id": result.task, "split": source.split}
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


def model_index(results: Sequence[TaskResult], limit: int | None = None) -> list[EvalResult]:
    """The results as the entries of a card's `model-index`, one for each measure."""
    entries = []
    for result in results:
        source = _hub_source(result)
        name = result.task if limit is None else f"{result.task} (first {result.examples})"
        for measure in result.shares:
            entry = EvalResult(
                task_type="text-generation",
                dataset_type=source.path if source else result.task.partition("=")[0],
                dataset_name=name,
                dataset_config=source.configuration if source else None,
                dataset_split=source.split if source else None,
                metric_type=measure,
                metric_name=f"{measure}: {CONVENTIONS[measure]}",
                metric_value=round(result.values[measure], 6),
            )
            entries.append(entry)
    return entries


def result_entries(results: Sequence[TaskResult], limit: int | None = None) -> dict[str, list[EvalResultEntry]]:
    """By task, what `.eval_results/<task>.yaml` says: the known measure of whole data sets of the Hub, no others."""
    entries = {}
    for result in results:
        source = _hub_source(result)
        if source and limit is None:
            notes = f"{result.metric}, {CONVENTIONS[result.metric]}; {result.examples} examples, zero-shot"
            value = round(result.values[result.metric], 6)
            entries[result.task] = [EvalResultEntry(source.path, result.task, value, notes=notes)]
    return entries


def write_to_card(folder: Path, results: Sequence[TaskResult], limit: int | None = None) -> None:
    """Put results into the `README.md` and the `.eval_results/` of a model's folder, in place of older ones."""
    readme = folder / "README.md"
    card = ModelCard.load(readme) if readme.is_file() else ModelCard(f"---\n{{}}\n---\n# {folder.resolve().name}\n")
    new = model_index(results, limit)
    data: Any = card.data
    kept = [old for old in data.eval_results or [] if _identity(old) not in map(_identity, new)]
    data.model_name = data.model_name or folder.resolve().name
    data.eval_results = [*kept, *new]
    card.save(readme)
    for task, entries in result_entries(results, limit).items():
        path = folder / ".eval_results" / f"{task}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False), encoding="utf-8")


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


def _identity(entry: EvalResult) -> tuple[Any, ...]:
    return entry.dataset_type, entry.dataset_config, entry.dataset_split, entry.dataset_name, entry.metric_type


def _number(value: float | None) -> str:
    if value is None or math.isnan(value):
        return ""
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.4g}"


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
