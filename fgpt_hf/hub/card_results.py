"""A run's measurements in the Hub's two forms: the card's `model-index` and the files of `.eval_results/`."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, eval_result_entries_to_yaml

from fgpt_hf.evaluation.results import ResultsRecord
from fgpt_hf.hub.front_matter import CARD, read_card, tidy_card
from fgpt_hf.hub.run_record import RunRecord
from fgpt_hf.hub.stage_record import StageRecord, without_folders

# Keys of metrics.jsonl, each with what the Hub calls the metric and what it measures; {text} is named by the stage.
TEXT_METRICS = {
    "eval_loss": ("loss", "nats per token of {text}"),
    "eval_bits_per_byte": ("bits_per_byte", "bits per UTF-8 byte of {text}"),
}
PAIR_METRICS = {
    "eval_loss": ("preference_loss", "nats per validation pair"),
    "eval_rewards/margins": ("reward_margin", "reward of the chosen reply minus that of the rejected one"),
    "eval_rewards/accuracies": ("reward_accuracy", "share of pairs whose chosen reply has the higher reward"),
}


class Measurement(NamedTuple):
    """One number of one task, with its standard error where that is known and what the metric means."""

    task: str
    metric: str
    value: float
    error: float | None
    convention: str | None


def validation_measurements(record: RunRecord) -> list[Measurement]:
    """Return the last losses on the run's own validation split."""
    last, stage = record.last, record.stage
    of_pairs = "eval_rewards/margins" in last
    examples = "pairs" if of_pairs else stage.examples if stage else "documents"
    return [
        Measurement(f"validation {examples}", metric, last[name], None, convention.format(text=_scored_text(stage)))
        for name, (metric, convention) in (PAIR_METRICS if of_pairs else TEXT_METRICS).items()
        if name in last
    ]


def benchmark_measurements(record: RunRecord) -> list[Measurement]:
    """Return every number of `results.json`; a task's name says if only its first examples were taken."""
    return [
        Measurement(
            _task_name(record, task),
            metric,
            value,
            metrics.get(f"{metric}_stderr"),
            record.results.conventions.get(metric),
        )
        for task, metrics in record.results.tasks.items()
        for metric, value in metrics.items()
        if not metric.endswith("_stderr")
    ]


def other_measurements(record: RunRecord) -> list[Measurement]:
    """Return what the folder's card had from elsewhere, such as an evaluation."""
    return [
        Measurement(entry.dataset_name, entry.metric_type, entry.metric_value, None, entry.metric_name)
        for entry in _others(record.card_results, _entries(record))
    ]


def all_results(record: RunRecord) -> list[EvalResult]:
    """Return the results for the card's front matter: the run's own, then those that its card had from elsewhere."""
    return join_results(_entries(record), record.card_results)


def join_results(entries: Sequence[EvalResult], earlier: Sequence[EvalResult]) -> list[EvalResult]:
    """Return the entries, followed by those earlier results that they do not replace."""
    return [*entries, *_others(earlier, entries)]


def metric_names(entries: Sequence[EvalResult]) -> list[str]:
    """Return each metric once, in the order of the results."""
    return list(dict.fromkeys(entry.metric_type for entry in entries))


def result_files(record: RunRecord) -> dict[str, bytes]:
    """Return the files of `.eval_results/`, one for each task that went through a whole dataset of the Hub."""
    files, results = {}, record.results
    for task, dataset in results.datasets.items():
        metrics = results.tasks.get(task, {})
        headline = results.runs[task].headline_metric if task in results.runs else None
        entries = [
            EvalResultEntry(
                dataset_id=dataset.id,
                task_id=dataset.task_id,
                value=value,
                notes=_notes(metric, results.conventions.get(metric), metrics.get(f"{metric}_stderr")),
            )
            for metric, value in metrics.items()
            if not metric.endswith("_stderr") and headline in (None, metric)
        ]
        if entries:
            text = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False)
            files[f".eval_results/{re.sub('[^A-Za-z0-9_-]', '-', task)}.yaml"] = text.encode()
    return files


def write_to_card(folder: Path, results: ResultsRecord) -> None:
    """Put results into the `README.md` and `.eval_results/` of a model's folder.

    Results of the same tasks and metrics are replaced; all others stay.

    Example:
        >>> from tempfile import mkdtemp
        >>> folder = Path(mkdtemp())
        >>> write_to_card(folder, ResultsRecord(tasks={"hellaswag": {"acc": 0.3}}))
        >>> ModelCard.load(folder / "README.md").data.eval_results[0].metric_value
        0.3
    """
    readme, name = folder / CARD, folder.resolve().name
    card = ModelCard(tidy_card(read_card(readme) if readme.is_file() else f"# {name}\n"))
    record = RunRecord(folder, results=results, card_results=card.data.get("eval_results", []))
    card.data["model_name"] = card.data.get("model_name", name)
    card.data["eval_results"] = all_results(record)
    card.save(readme)
    for path, content in result_files(record).items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(content)


def _scored_text(stage: StageRecord | None) -> str:
    if stage is None or not stage.is_tuning:
        return "the validation documents"
    only_replies = getattr(stage.run, "assistant_only_loss", True)
    return "the assistant's replies in the validation conversations" if only_replies else "the validation conversations"


def _task_name(record: RunRecord, task: str) -> str:
    name = record.stage.without_folders(task) if record.stage else without_folders(task)
    run = record.results.runs.get(task)
    return f"{name} (first {run.examples})" if run and record.results.settings.get("limit") else name


def _entries(record: RunRecord) -> list[EvalResult]:
    """Return the results that the run's own files hold."""
    chosen = record.stage.validation_datasets if record.stage else []
    datasets = chosen or (record.stage.datasets if record.stage else [])
    names = ", ".join(dataset.name for dataset in datasets) or "validation split"
    only_id = datasets[0].hub_id if len(datasets) == 1 else None
    split = "validation" if chosen else "validation (by a hash of each example)"
    own = [_entry(measured, only_id or names, names, split) for measured in validation_measurements(record)]
    datasets_by_name = {_task_name(record, task): dataset for task, dataset in record.results.datasets.items()}
    for measured in benchmark_measurements(record):
        if source := datasets_by_name.get(measured.task):
            own.append(_entry(measured, source.id, measured.task, source.split, source.config))
        else:
            own.append(_entry(measured, re.split("[ =]", measured.task)[0], measured.task))
    return own


def _entry(
    measured: Measurement,
    dataset_type: str,
    dataset_name: str,
    split: str | None = None,
    config: str | None = None,
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
    """Return those earlier results that measure something else than the entries do."""
    measured = {(entry.dataset_name, entry.metric_type) for entry in entries}
    return [entry for entry in earlier if (entry.dataset_name, entry.metric_type) not in measured]


def _notes(metric: str, convention: str | None, error: float | None) -> str:
    standard_error = None if error is None else f"standard error {error:.2g}"
    return "; ".join(note for note in (metric, convention, standard_error) if note)
