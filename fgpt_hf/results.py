"""A run's measurements in the Hub's two forms: the card's `model-index` and the files of `.eval_results/`."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml
from huggingface_hub.repocard_data import eval_results_to_model_index

from fgpt_hf.facts import Facts

HELD_OUT = {
    "eval_loss": ("loss", "nats per token of held-out documents"),
    "eval_bits_per_byte": ("bits_per_byte", "bits per byte of held-out text"),
}


class Measurement(NamedTuple):
    """One number of one task; `error` is its standard error, where that is known."""

    task: str
    metric: str
    value: float
    error: float | None
    convention: str | None


def held_out(facts: Facts) -> list[Measurement]:
    """The last losses on the run's own held-out split."""
    last = facts.last
    return [
        Measurement("held-out text", metric, last[name], None, convention)
        for name, (metric, convention) in HELD_OUT.items()
        if name in last
    ]


def benchmarks(facts: Facts) -> list[Measurement]:
    """Every number of `results.json`."""
    return [
        Measurement(task, metric, value, numbers.get(f"{metric}_stderr"), conventions.get(metric))
        for conventions in [facts.results.get("conventions", {})]
        for task, numbers in facts.results.get("tasks", {}).items()
        for metric, value in numbers.items()
        if not metric.endswith("_stderr")
    ]


def evaluation_results(facts: Facts) -> list[dict[str, Any]]:
    """The `results` of the card's `model-index`."""
    entries = [*_of_held_out(facts), *_of_benchmarks(facts)]
    (index,) = eval_results_to_model_index("", entries) if entries else [{"results": []}]
    return index["results"]


def metric_names(results: Sequence[dict[str, Any]]) -> list[str]:
    """Each metric in `evaluation_results` once, in their order."""
    return list(dict.fromkeys(metric["type"] for result in results for metric in result["metrics"]))


def result_files(facts: Facts) -> dict[str, bytes]:
    """The files of `.eval_results/`, for the tasks whose data set on the Hub is known."""
    files = {}
    for task, dataset in facts.results.get("datasets", {}).items():
        entries = [
            EvalResultEntry(
                dataset_id=dataset["id"],
                task_id=dataset.get("task_id", task),
                value=measured.value,
                dataset_revision=dataset.get("revision"),
                notes="; ".join(filter(None, (measured.metric, measured.convention, _plus_minus(measured.error)))),
            )
            for measured in benchmarks(facts)
            if measured.task == task
        ]
        if entries:
            text = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False)
            files[f".eval_results/{task}.yaml"] = text.encode()
    return files


def _of_held_out(facts: Facts) -> Iterator[EvalResult]:
    name = facts.dataset or "held-out documents"
    for measured in held_out(facts):
        yield _entry(measured, type=facts.hub_dataset or name, name=name, split="held out by document hash")


def _of_benchmarks(facts: Facts) -> Iterator[EvalResult]:
    for measured in benchmarks(facts):
        dataset = facts.results.get("datasets", {}).get(measured.task, {})
        yield _entry(measured, type=dataset.get("id", measured.task), name=measured.task, split=dataset.get("split"))


def _entry(measured: Measurement, type: str, name: str, split: str | None) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type=type,
        dataset_name=name,
        dataset_split=split,
        metric_type=measured.metric,
        metric_name=measured.convention,
        metric_value=measured.value,
    )


def _plus_minus(error: float | None) -> str | None:
    return None if error is None else f"standard error {error:.2g}"
