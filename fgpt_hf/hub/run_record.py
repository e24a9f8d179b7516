"""Read back what a finished model's folder and its run's folder say, for the model card."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, get_local_safetensors_metadata
from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError
from transformers import PreTrainedConfig

from fgpt_hf.errors import UserError
from fgpt_hf.evaluation.results import ResultsRecord
from fgpt_hf.files import read_json
from fgpt_hf.hub.front_matter import CARD, read_card, results_of_card
from fgpt_hf.hub.stage_record import StageRecord, read_stage
from fgpt_hf.model.io import load_config
from fgpt_hf.model.lora import ADAPTER
from fgpt_hf.training.checkpoints import PREFIX, step_of
from fgpt_hf.training.records import PROVENANCE, RECORD, RESULTS, find_run, read_metrics, read_record, read_samples


class Sample(NamedTuple):
    """What the model wrote to a prompt at a step, by decoding: `{"greedy": …, "sampled": …}`."""

    step: int
    prompt: str
    outputs: Mapping[str, str]


@dataclass(frozen=True)
class RunRecord:
    """All that is known of a model; what a run did not record is empty.

    Attributes:
        model: the model's folder.
        run_folder: the folder of the run that trained it, if it lies in one.
        config: the network's shape; an adapter has none.
        stage: the run that trained it, and the stages before.
        metrics: the lines of `metrics.jsonl`.
        samples: the lines of `samples.jsonl`.
        results: the benchmarks in `results.json`.
        card_results: the `model-index` of the folder's present card, to which an evaluation may have added.
    """

    model: Path
    run_folder: Path | None = None
    config: PreTrainedConfig | None = None
    stage: StageRecord | None = None
    metrics: Sequence[Mapping[str, float]] = ()
    samples: Sequence[Sample] = ()
    results: ResultsRecord = ResultsRecord(tasks={})
    card_results: Sequence[EvalResult] = ()

    @cached_property
    def parameters(self) -> int:
        """The number of values in the weight files: a tied head counts once, and an adapter has only its own.

        Raises:
            UserError: the weights cannot be read.
        """
        weights = self.model / ADAPTER if self.is_adapter else self.model
        try:
            return sum(get_local_safetensors_metadata(weights).parameter_count.values())
        except (SafetensorsParsingError, NotASafetensorsRepoError) as error:
            raise UserError(f"{self.model} holds no weights that can be read: {error}") from error

    @property
    def last(self) -> Mapping[str, float]:
        """Every measurement at its last value, `step`, `tokens` and `seconds` included."""
        return {name: value for line in self.metrics for name, value in line.items()}

    @property
    def last_samples(self) -> list[Sample]:
        """All samples of the last step that has any."""
        return [sample for sample in self.samples if sample.step == self.samples[-1].step]

    @property
    def first_samples(self) -> list[Sample]:
        """All samples of the first step that has any."""
        return [sample for sample in self.samples if sample.step == self.samples[0].step]

    @property
    def stages(self) -> list[StageRecord]:
        """The stages of training that are known, the first one first."""
        return list(_stages_before(self.stage))[::-1]

    @property
    def is_adapter(self) -> bool:
        """Whether the folder holds a LoRA adapter, which needs the weights of the model that it was trained on."""
        return (self.model / ADAPTER).is_file()

    @property
    def is_chat_model(self) -> bool:
        """Whether it was trained to answer, which is what every stage after base training does."""
        return self.stage is not None and self.stage.is_tuning


def _stages_before(stage: StageRecord | None) -> Iterator[StageRecord]:
    while stage is not None:
        yield stage
        stage = stage.before


def read_run_record(model: Path) -> RunRecord:
    """Return what is known of a model's folder, and of the run's folder around it if there is one.

    A checkpoint, `step_00000400`, gets what was known at its step.

    Raises:
        UserError: one of the files is damaged.
    """
    run = find_run(model)
    readme, config = model / CARD, model / "config.json"
    record = RunRecord(
        model,
        config=load_config(str(model)) if _read_json(config) else None,
        card_results=results_of_card(read_card(readme)) if readme.is_file() else [],
    )
    if run is None:
        return record
    is_checkpoint = model.resolve().name.startswith(PREFIX)
    step = step_of(model.resolve()) if is_checkpoint else math.inf
    metrics = [line for line in read_metrics(run) if line["step"] <= step]
    last = metrics[-1] if metrics else {}
    return RunRecord(
        model=model,
        run_folder=run,
        config=record.config,
        stage=_read_stage(run, last),
        metrics=metrics,
        samples=[_sample(line) for line in read_samples(run) if line["step"] <= step],
        results=ResultsRecord(tasks={}) if is_checkpoint else _read_results(run / RESULTS),
        card_results=record.card_results,
    )


def check_records(run: Path) -> None:
    """Read what a run recorded of itself; UserError if one of these files is damaged."""
    metrics = read_metrics(run)
    _read_stage(run, metrics[-1] if metrics else {})
    read_samples(run)
    _read_results(run / RESULTS)


def _read_stage(run: Path, last: Mapping[str, float]) -> StageRecord:
    recorded, provenance = read_record(run / RECORD), _read_json(run / PROVENANCE)
    try:
        return read_stage(recorded, provenance, last)
    except UserError as error:
        raise UserError(f"{run / RECORD} or {PROVENANCE} is damaged: {error}") from error
    except RecursionError as error:
        raise UserError(f"{run / PROVENANCE} is damaged: it names an endless chain of earlier runs") from error


def _read_results(path: Path) -> ResultsRecord:
    content = _read_json(path)
    try:
        return ResultsRecord.from_json({"tasks": {}, **content})
    except UserError as error:
        raise UserError(f"{path} does not hold the results of this version's fgpt evaluate: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _sample(line: Mapping[str, Any]) -> Sample:
    outputs = {name: value for name, value in line.items() if name not in ("step", "prompt")}
    return Sample(line["step"], line["prompt"], outputs)
