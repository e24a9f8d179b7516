"""All that a finished model's folder and its run's folder say about it, read back for the model card."""

import math
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, get_local_safetensors_metadata
from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

from fgpt_hf.data.conversations import NAMES as CONVERSATIONS
from fgpt_hf.data.corpora import NAMES as CORPORA
from fgpt_hf.data.preference_pairs import NAMES as PAIRS
from fgpt_hf.data.sources import COMPRESSIONS, FILE_FORMATS, parse_mixture
from fgpt_hf.errors import UserError
from fgpt_hf.files import read_json, read_json_lines
from fgpt_hf.model.lora import ADAPTER
from fgpt_hf.training.run_folder import PROVENANCE, RECORD, RESULTS, read_record

# At a value's start and after its commas and equals signs: /home/me/, ~/, ../, C:\ before a name.
_FOLDERS = re.compile(r"(?<![^,=])(?:[A-Za-z]:|~|\.{1,2})?[\\/](?:[^,=\\/]+[\\/])*(?=[^,=\\/])")
KNOWN = (CORPORA, CONVERSATIONS, PAIRS)
HUB_NAMES = {name: place for names in KNOWN for name, place in names.on_hub.items()}
NOT_ON_HUB = {name for names in KNOWN for name in (*names.embedded, *names.files)}


@dataclass(frozen=True)
class RunRecord:
    """What is known; whatever a run did not record is empty.

    Attributes:
        model: the model's folder.
        run_folder: the folder of the run that trained it, if it is known.
        config: `config.json`.
        run: `run.yaml`.
        metrics: the lines of `metrics.jsonl`.
        samples: those of `samples.jsonl`.
        provenance: `provenance.json`.
        results: `results.json`: `tasks` maps a task to its metrics, `{"acc": 0.44, "acc_stderr": 0.005}`. Optional:
            `datasets` maps a task to `{"id", "task_id", "split", "revision"}` of the Hub, `conventions` a metric to
            what it means, `versions` a package to its version, and `harness` says what computed it.
        card_results: the `model-index` of the card that the folder has, to which an evaluation may have added.
    """

    model: Path
    run_folder: Path | None = None
    config: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    card_results: list[EvalResult] = field(default_factory=list)

    @cached_property
    def parameters(self) -> int:
        """How many numbers the weight files hold; a tied head counts once, and of an adapter its own count."""
        weights = self.model / ADAPTER if self.is_adapter else self.model
        try:
            return sum(get_local_safetensors_metadata(weights).parameter_count.values())
        except (SafetensorsParsingError, NotASafetensorsRepoError) as error:
            raise UserError(f"{self.model} holds no weights that can be read: {error}") from error

    @property
    def last(self) -> dict[str, Any]:
        """Every measurement at its last value, `step`, `tokens` and `seconds` included."""
        return {name: value for line in self.metrics for name, value in line.items()}

    @property
    def last_samples(self) -> list[dict[str, Any]]:
        """All samples of the last step that has any."""
        last = self.samples[-1]["step"] if self.samples else None
        return [line for line in self.samples if line["step"] == last]

    @property
    def first_samples(self) -> list[dict[str, Any]]:
        """All samples of the first step that has any."""
        return [line for line in self.samples if line["step"] == self.samples[0]["step"]]

    @property
    def training_flops(self) -> float | None:
        """Floating-point operations of the training: 6 N + 12 L C T a token (Chowdhery et al. 2022, appendix B)."""
        tokens, names = self.last.get("tokens"), ("num_hidden_layers", "hidden_size", "max_position_embeddings")
        if not tokens or not all(name in self.config for name in names):
            return None
        layers, width, context = (self.config[name] for name in names)
        return float(tokens * (6 * self.parameters + 12 * layers * width * context))

    @property
    def source(self) -> dict[str, Any]:
        """The fields of `run` that describe the text, also where the run was given rows made of it."""
        return self.run | self.provenance.get("source", {})

    @property
    def dataset(self) -> str | None:
        """What the data is called: names on the Hub, files without their folders, or names of this project."""
        return ", ".join(self._called(name) for name in self._dataset_names) or None

    @property
    def dataset_configuration(self) -> str | None:
        """The configuration of a data set on the Hub."""
        known = next((HUB_NAMES[name][1] for name in self._dataset_names if name in HUB_NAMES), None)
        return self.source.get("dataset_config_name") or known

    @property
    def hub_datasets(self) -> list[str]:
        """The data's names, as far as it is on the Hub."""
        return [
            self._called(name) for name in self._dataset_names if name not in NOT_ON_HUB and not self._is_local(name)
        ]

    @property
    def _dataset_names(self) -> list[str]:
        """The names that the run was given, which is a mixture where it began from another model."""
        name = self.source.get("dataset_name")
        if name is None:
            return []
        return [share.name for share in parse_mixture(name)] if self.is_chat_model else [name]

    def _called(self, name: str) -> str:
        if name in NOT_ON_HUB:
            return name
        return Path(name).name if self._is_local(name) else HUB_NAMES.get(name, (name,))[0]

    def _is_local(self, name: str) -> bool:
        """Whether a name is that of a file or a folder of the machine that trained."""
        path = Path(name)
        looks_local = path.suffix in (*FILE_FORMATS, *COMPRESSIONS) or name[0] in "./~" or path.exists()
        return looks_local or name in self.provenance.get("local", ())

    @property
    def base_model(self) -> str | None:
        """The model on the Hub that the training began from; a folder of this machine is nobody else's business."""
        name = self.run.get("model_name_or_path")
        return name if name and name.count("/") <= 1 and not self._is_local(name) else None

    def without_folders(self, value: str) -> str:
        """A value of the run without the folders of the machine that it was on, which are nobody else's business."""
        for name in self.provenance.get("local", ()):
            value = value.replace(name, Path(name).name)
        return _FOLDERS.sub("", value)

    @property
    def is_adapter(self) -> bool:
        """Whether the folder holds an adapter, which works on the base model's weights."""
        return (self.model / ADAPTER).is_file()

    @property
    def is_chat_model(self) -> bool:
        """Whether it was trained on conversations: its run began from another model."""
        return self.run.get("model_name_or_path") is not None


def read_facts(model: Path) -> RunRecord:
    """The facts of a model's folder, and of the run's folder that it lies in, if it does.

    Of a checkpoint, `step_00000400`, they are what was known at its step.

    Raises:
        UserError: one of the files is damaged.
    """
    run = next((folder for folder in model.resolve().parents[:2] if (folder / RECORD).is_file()), None)
    config = _read_json(model / "config.json")
    card_results = results_of_card((model / "README.md").read_text("utf-8")) if (model / "README.md").is_file() else []
    if run is None:
        return RunRecord(model, config=config, card_results=card_results)
    is_checkpoint = model.resolve().name.startswith("step_")
    step = int(model.resolve().name.removeprefix("step_")) if is_checkpoint else math.inf
    return RunRecord(
        model=model,
        run_folder=run,
        config=config,
        run=read_record(run / RECORD),
        metrics=[line for line in read_json_lines(run / "metrics.jsonl") if line["step"] <= step],
        samples=[line for line in read_json_lines(run / "samples.jsonl") if line["step"] <= step],
        provenance=_read_json(run / PROVENANCE),
        results={} if is_checkpoint else _read_json(run / RESULTS),
        card_results=card_results,
    )


def results_of_card(card: str) -> list[EvalResult]:
    """The results in a card's `model-index`.

    Raises:
        UserError: the card's front matter cannot be read.
    """
    try:
        data: Any = ModelCard(card, ignore_metadata_errors=True).data
        return data.eval_results or []
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"the front matter of the model card cannot be read: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
