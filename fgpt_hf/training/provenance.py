"""Where a model comes from: what `provenance.json` records, and how a run writes it."""

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedConfig

from fgpt_hf.config.data_options import DatasetOptions, TextSource
from fgpt_hf.config.runs import Run
from fgpt_hf.data.dataset_names import parse_mixture, parse_validation_names
from fgpt_hf.data.sources import DataProvenance
from fgpt_hf.data.splits import Sizes
from fgpt_hf.evaluation.results import package_versions
from fgpt_hf.files import read_json, write_json
from fgpt_hf.model.configuration_fgpt import FGPTConfig
from fgpt_hf.model.io import model_name
from fgpt_hf.model.license import license_of
from fgpt_hf.model.own_code import network_code_hash
from fgpt_hf.parsing import as_type
from fgpt_hf.runtime.hardware import device_name
from fgpt_hf.runtime.network import flops_per_token
from fgpt_hf.training.records import PROVENANCE, RECORD, find_run, read_metrics, read_record
from fgpt_hf.training.run_folder import RunFolder


@dataclass(frozen=True)
class RunBefore:
    """The records of the run that trained the model which another run started from.

    Attributes:
        run: its `run.yaml`.
        provenance: its `provenance.json`.
        last: `step`, `tokens` and `seconds` of the last line of its `metrics.jsonl`.
    """

    run: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    last: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Provenance:
    """What `provenance.json` holds.

    Attributes:
        splits: the size of each split; `data` in the file.
        source: fields of `TextSource`, where the run itself was given rows made from it.
        local: the model and the data that the run names and that lie on the machine that trained, and so on no Hub.
        precision: accelerate's name of it: "no", "bf16" or "fp16".
        training_flops: floating-point operations of the training.
        commit: of the checkout that the run used, where that was unchanged.
        network_code_sha256: of the network's own code, which tells a run with a changed block from others.
        model_type: the network's, as transformers names it.
        base_license: the license of the model that the run started from, as its card states it.
        added_tokens: tokens that the run gave the model's tokenizer.
        started_from: the run before, where the run starts from a model of the same machine.
    """

    splits: Sizes = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)
    local: Sequence[str] = ()
    device: str | None = None
    processes: int | None = None
    precision: str | None = None
    training_flops: float | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    commit: str | None = None
    network_code_sha256: str | None = None
    model_type: str | None = None
    base_license: str | None = None
    added_tokens: Sequence[str] = ()
    started_from: RunBefore | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the content of the file, without what is not known."""
        values = asdict(self)
        content = {"data": values.pop("splits"), **values}
        return {name: value for name, value in content.items() if value not in (None, {})}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Provenance":
        """Return what `to_json` gave; raise UserError if a value is of another type.

        Example:
            >>> Provenance.from_json(Provenance(processes=2).to_json()).processes
            2
        """
        found = as_type(cls, {**content, "splits": content.get("data", {})})
        as_type(TextSource, found.source)
        return found


def record_provenance(
    folder: RunFolder,
    accelerator: Accelerator,
    data: DataProvenance,
    config: PreTrainedConfig,
    tokens: int,
    added_tokens: Sequence[str] = (),
) -> None:
    """Write `provenance.json` into the run's folder: data, device, processes, versions, and the code's commit and hash.

    Args:
        tokens: how many the training took, for its operations by `network.flops_per_token`.
        added_tokens: tokens that the run gave the model's tokenizer.
    """
    if not folder.is_writer:
        return
    provenance = Provenance(
        splits=data.sizes,
        source=data.source,
        local=[name for name in _named(folder.run) if Path(name).exists()],
        device=device_name(accelerator.device),
        processes=accelerator.num_processes,
        precision=accelerator.mixed_precision,
        training_flops=flops_per_token(folder.run, config) * tokens,
        versions=package_versions(),
        commit=_commit(),
        network_code_sha256=network_code_hash() if isinstance(config, FGPTConfig) else None,
        model_type=config.model_type,
        base_license=license_of(model_name(folder.run.start_model)) if folder.run.start_model else None,
        added_tokens=added_tokens,
        started_from=_run_before(folder.run),
    )
    write_json(folder.path / PROVENANCE, provenance.to_json())


def _run_before(run: Run) -> RunBefore | None:
    """Return what is recorded of the run that trained the model which this one starts from."""
    folder = find_run(Path(run.start_model)) if run.start_model else None
    if folder is None:
        return None
    provenance, metrics = folder / PROVENANCE, read_metrics(folder)
    return RunBefore(
        run=read_record(folder / RECORD),
        provenance=read_json(provenance) if provenance.is_file() else {},
        last={name: metrics[-1][name] for name in ("step", "tokens", "seconds")} if metrics else {},
    )


def _named(run: Run) -> list[str]:
    """Return the names of the model and the datasets that a run starts from."""
    started_from = [run.start_model] if run.start_model else []
    if isinstance(run, TextSource):
        started_from += [run.tokenizer] if run.tokenizer else []
    if isinstance(run, (TextSource, DatasetOptions)):
        entries = parse_mixture(run.dataset_name) + parse_validation_names(run.validation_dataset)
        return [*started_from, *(entry.name for entry in entries)]
    return started_from


def _commit() -> str | None:
    """Return the commit of the checkout that this code runs from, or None if it is installed or has been changed."""
    git = ["git", "-C", str(Path(__file__).parent)]
    questions = (["ls-files", "--error-unmatch", __file__], ["status", "--porcelain", "-uno"], ["rev-parse", "HEAD"])
    try:
        answers = [subprocess.run([*git, *question], capture_output=True, text=True) for question in questions]
    except OSError:  # no git
        return None
    tracked, changes, commit = answers
    is_known = tracked.returncode == 0 and changes.stdout == ""  # untracked: installed inside another checkout
    return commit.stdout.strip() if is_known else None
