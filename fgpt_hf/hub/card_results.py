"""A run's measurements in the Hub's two forms: the card's `model-index` and the files of `.eval_results/`."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, eval_result_entries_to_yaml
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

from fgpt_hf.hub.run_record import RunRecord

VALIDATION = {
    "eval_loss": ("loss", "nats per token of held-out documents"),
    "eval_bits_per_byte": ("bits_per_byte", "bits per byte of held-out text"),
}
VALIDATION_PAIRS = {
    "eval_loss": ("preference_loss", "nats per held-out pair"),
    "eval_rewards/margins": ("reward_margin", "reward of the chosen reply less that of the rejected one"),
    "eval_rewards/accuracies": ("reward_accuracy", "share of pairs whose chosen reply has the greater reward"),
}


class Measurement(NamedTuple):
    """One number of one task; `error` is its standard error, where that is known."""

    task: str
    metric: str
    value: float
    error: float | None
    convention: str | None


def validation_measurements(facts: RunRecord) -> list[Measurement]:
    """The last losses on the run's own held-out split."""
    last = facts.last
    of_pairs = "eval_rewards/margins" in last
    return [
        Measurement("held-out pairs" if of_pairs else "held-out text", metric, last[name], None, convention)
        for name, (metric, convention) in (VALIDATION_PAIRS if of_pairs else VALIDATION).items()
        if name in last
    ]


def benchmark_measurements(facts: RunRecord) -> list[Measurement]:
    """Every number of `results.json`; the name of a task says so where only its first examples were taken."""
    results = facts.results
    conventions, limit = results.get("conventions", {}), results.get("settings", {}).get("limit")
    return [
        Measurement(
            facts.without_folders(task) + (f" (first {results['runs'][task]['examples']})" if limit else ""),
            metric,
            value,
            numbers.get(f"{metric}_stderr"),
            conventions.get(metric),
        )
        for task, numbers in results.get("tasks", {}).items()
        for metric, value in numbers.items()
        if not metric.endswith("_stderr")
    ]


def noted_results(facts: RunRecord) -> list[Measurement]:
    """What the folder's card had from elsewhere, an evaluation for example."""
    return [
        Measurement(entry.dataset_name, entry.metric_type, entry.metric_value, None, entry.metric_name)
        for entry in _others(facts.card_results, _entries(facts))
    ]


def model_index(facts: RunRecord, name: str) -> list[dict[str, Any]]:
    """The card's `model-index`, empty if nothing was measured."""
    return joined_results(_index(name, _entries(facts)), name, facts.card_results)


def joined_results(index: list[dict[str, Any]], name: str, earlier: Sequence[EvalResult]) -> list[dict[str, Any]]:
    """A `model-index` with those earlier results that it does not replace."""
    entries = model_index_to_eval_results(index)[1] if index else []
    entries = [*entries, *_others(earlier, entries)]
    return _index(name, entries)


def result_files(facts: RunRecord) -> dict[str, bytes]:
    """The files of `.eval_results/` that `results.json` gives: the tasks that went through a data set of the Hub."""
    files = {}
    for task, dataset in facts.results.get("datasets", {}).items():
        known_by = facts.results.get("runs", {}).get(task, {}).get("known_by")
        entries = [
            EvalResultEntry(
                dataset_id=dataset["id"],
                task_id=dataset.get("task_id", task),
                value=measured.value,
                dataset_revision=dataset.get("revision"),
                notes="; ".join(filter(None, (measured.metric, measured.convention, _plus_minus(measured.error)))),
            )
            for measured in benchmark_measurements(facts)
            if measured.task == task and known_by in (None, measured.metric)
        ]
        if entries:
            text = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False)
            files[f".eval_results/{task}.yaml"] = text.encode()
    return files


def write_to_card(folder: Path, results: Mapping[str, Any]) -> None:
    """Put results, as `results.as_json` gives them, into the `README.md` and `.eval_results/` of a folder."""
    readme = folder / "README.md"
    card = ModelCard.load(readme) if readme.is_file() else ModelCard(f"---\n{{}}\n---\n# {folder.resolve().name}\n")
    data: Any = card.data
    facts = RunRecord(folder, results=dict(results), card_results=data.eval_results or [])
    data.model_name = data.model_name or folder.resolve().name
    data.eval_results = [*_entries(facts), *_others(facts.card_results, _entries(facts))]
    card.save(readme)
    for name, content in result_files(facts).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def _entries(facts: RunRecord) -> list[EvalResult]:
    """What the run's own files say."""
    name, split = facts.dataset or "held-out documents", "held out by document hash"
    place = facts.hub_datasets[0] if len(facts.hub_datasets) == 1 else name
    datasets = facts.results.get("datasets", {})
    own = [_entry(measured, place, name, split) for measured in validation_measurements(facts)]
    for measured in benchmark_measurements(facts):
        dataset = datasets.get(measured.task) or {"id": re.split("[ =]", measured.task)[0]}
        own.append(_entry(measured, dataset["id"], measured.task, dataset.get("split"), dataset.get("config")))
    return own


def _index(name: str, entries: list[EvalResult]) -> list[dict[str, Any]]:
    return (eval_results_to_model_index(name, entries) or []) if entries else []


def _entry(
    measured: Measurement, dataset_type: str, dataset_name: str, split: str | None, config: str | None = None
) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type=dataset_type,
        dataset_name=dataset_name,
        dataset_config=config,
        dataset_split=split,
        metric_type=measured.metric,
        metric_name=measured.convention,
        metric_value=measured.value,
    )


def _others(earlier: Sequence[EvalResult], entries: Sequence[EvalResult]) -> list[EvalResult]:
    """Those earlier results that measure something else than the entries do."""
    measured = {(entry.dataset_name, entry.metric_type) for entry in entries}
    return [entry for entry in earlier if (entry.dataset_name, entry.metric_type) not in measured]


def _plus_minus(error: float | None) -> str | None:
    return None if error is None else f"standard error {error:.2g}"
