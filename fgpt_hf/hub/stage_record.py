"""One stage of a model's training, as its run recorded it: which data, how much of it, on which machine."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fgpt_hf.config.runs import PreferenceRun, Run, TuningRun, kind_of_run
from fgpt_hf.data.dataset_names import parse_mixture
from fgpt_hf.data.local_files import is_local
from fgpt_hf.data.sources import CONVERSATIONS, PREFERENCES, on_hub
from fgpt_hf.errors import UserError
from fgpt_hf.parsing import as_type
from fgpt_hf.training.provenance import Provenance

# At a value's start and after its commas and equals signs: /home/me/, ~/, ../, C:\ before a name.
_FOLDERS = re.compile(r"(?<![^,=])(?:[A-Za-z]:|~|\.{1,2})?[\\/](?:[^,=\\/]+[\\/])*(?=[^,=\\/])")
URLS = {**CONVERSATIONS.files, **PREFERENCES.files}  # datasets at an address, by name
HUB = "https://huggingface.co"
METHODS = {"sigmoid": "DPO", "ipo": "IPO", "simpo": "SimPO"}


class DatasetName(NamedTuple):
    """What a card calls a dataset, and where it is: its id on the Hub, or an address, if it has one."""

    name: str
    hub_id: str | None = None
    url: str | None = None
    configuration: str | None = None


@dataclass(frozen=True)
class StageRecord:
    """One training run.

    Attributes:
        run: its options.
        steps, tokens, seconds: how far it went.
        before: the stage that left the model which this one started from.
    """

    run: Run
    provenance: Provenance = Provenance()
    steps: int | None = None
    tokens: int | None = None
    seconds: float | None = None
    before: "StageRecord | None" = None

    @property
    def is_tuning(self) -> bool:
        """Whether the stage began with a trained model."""
        return isinstance(self.run, TuningRun)

    @property
    def name(self) -> str:
        """What the stage is called: "base training", "instruction tuning" or "preference optimization (DPO)"."""
        if self.method:
            return f"preference optimization ({self.method})"
        return "instruction tuning" if self.is_tuning else "base training"

    @property
    def method(self) -> str | None:
        """The method of preference optimization."""
        return METHODS[self.run.loss_type] if isinstance(self.run, PreferenceRun) else None

    @property
    def examples(self) -> str:
        """What the stage's examples are: documents, conversations or pairs."""
        return "pairs" if self.method else "conversations" if self.is_tuning else "documents"

    @property
    def validation_fraction(self) -> float:
        """The fraction of the examples that is never trained on."""
        return float(self._source("validation_fraction"))

    @property
    def datasets(self) -> list[DatasetName]:
        """The data that the stage was trained on."""
        return self._datasets("dataset_name")

    @property
    def validation_datasets(self) -> list[DatasetName]:
        """The data that it was measured on, where that is not a fraction of what it was trained on."""
        return self._datasets("validation_dataset")

    def _datasets(self, option: str) -> list[DatasetName]:
        given = self._source(option)
        if given is None:
            return []
        try:
            names = [entry.name for entry in parse_mixture(given)]
        except UserError:  # a name that was written by hand
            names = [given]
        return [self._dataset(name) for name in names]

    @property
    def base_model(self) -> str | None:
        """The model on the Hub that the stage began with; a folder of somebody's machine is not published."""
        name = self.run.start_model
        return name if name and name.count("/") <= 1 and not self._is_local(name) else None

    def without_folders(self, value: str) -> str:
        """Return a value of the run without the folders of the machine that it was on, which are not published."""
        for name in self.provenance.local:
            value = value.replace(name, Path(name).name)
        return without_folders(value)

    def _source(self, option: str) -> Any:
        """Return an option that describes the text, from the run that prepared it or else from this one."""
        return {**vars(self.run), **self.provenance.source}.get(option)

    def _dataset(self, name: str) -> DatasetName:
        found = on_hub(name) if name not in self.provenance.local else None
        if found:
            configuration = self._source("dataset_config_name") or found.configuration
            return DatasetName(found.repo_id, found.repo_id, configuration=configuration)
        return DatasetName(name, url=URLS[name]) if name in URLS else DatasetName(Path(name).name)

    def _is_local(self, name: str) -> bool:
        """Whether a name is that of a file or a folder of the machine that trained."""
        return is_local(name) or name in self.provenance.local


@dataclass(frozen=True)
class _Reached:
    """How far a run went, as the last line of its `metrics.jsonl` says."""

    step: int | None = None
    tokens: int | None = None
    seconds: float | None = None


def read_stage(run: Mapping[str, Any], provenance: Mapping[str, Any], last: Mapping[str, float]) -> StageRecord:
    """Return the stage that a `run.yaml`, a `provenance.json` and the last line of a `metrics.jsonl` record.

    Raises:
        UserError: one of their values is of another type than a run writes.
    """
    recorded, reached = Provenance.from_json(provenance), as_type(_Reached, last)
    before = recorded.started_from
    return StageRecord(
        run=as_type(kind_of_run(run), run),
        provenance=recorded,
        steps=reached.step,
        tokens=reached.tokens,
        seconds=reached.seconds,
        before=read_stage(before.run, before.provenance, before.last) if before else None,
    )


def without_folders(value: str) -> str:
    """Return a text without the folders before the names of files in it.

    Example:
        >>> without_folders("a.jsonl,/home/me/private/b.jsonl:200")
        'a.jsonl,b.jsonl:200'
    """
    return _FOLDERS.sub("", value)
