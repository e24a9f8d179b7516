"""Where a model comes from, as `provenance.json` records it and as a model card reads it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fgpt_hf.config.option_groups import TextSource
from fgpt_hf.data.splits import Sizes
from fgpt_hf.parsing import as_type


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
        network_code_sha256: of the network's own two files, which tells a run with a changed block from others.
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
