"""Summarize what the quickstart has learned, stage by stage, next to what compression and counting reach on its text.

    python benchmarks/quickstart.py runs/quickstart

reads what `make quickstart` has measured. `--record FILE` also writes it as JSON, as docs/quickstart.json, whose
figures the README shows.
"""

import argparse
import json
import math
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fgpt_hf.cli.entry_point import command_line
from fgpt_hf.data.pydocs import load_pydocs
from fgpt_hf.evaluation.tasks import load_examples
from fgpt_hf.files import write_json
from fgpt_hf.tokenizer.document_encoder import encode_documents
from fgpt_hf.tokenizer.tokenizer import build_tokenizer
from fgpt_hf.training.records import read_metrics

STAGES = ("base", "instruct", "preference")
COUNTED = 1000  # documents whose tokens are counted


@dataclass(frozen=True)
class Change:
    """A measurement before a stage and after it, with its standard error where it has one."""

    before: float
    after: float
    stderr: float | None = None


@dataclass(frozen=True)
class QuickstartRecord:
    """The measurements of one quickstart.

    Attributes:
        seconds: of training, by stage.
        bits_per_byte: of documents that the base model never saw.
        compressors: what others need for such documents, in bits per byte, by name.
    """

    seconds: Mapping[str, float]
    validation_loss: Change
    bits_per_byte: Change
    compressors: Mapping[str, float]
    replies_that_end: Change
    facts: Change
    unseen_capitals: Change
    reward_margin: Change

    @property
    def lines(self) -> list[str]:
        """The summary, a line for each gain."""
        others = ", ".join(f"{name} {bits:.2f}" for name, bits in self.compressors.items())
        seconds = " + ".join(f"{self.seconds[stage]:.0f}" for stage in STAGES)
        return [
            f"seconds of training                   {seconds} (base, instruct, preference)",
            f"validation loss of the base model     {_shown(self.validation_loss)} nats per token",
            f"bits per byte of held-out text        {_shown(self.bits_per_byte)} ({others})",
            f"replies that end by themselves        {_percent(self.replies_that_end)}",
            f"facts, in wordings used in training   {_percent(self.facts)}",
            f"capitals, in wordings never seen      {_percent(self.unseen_capitals)}",
            f"reward margin of held-out pairs       {_shown(self.reward_margin)}",
        ]


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="Folder of the three runs.")
    parser.add_argument("--record", type=Path, metavar="FILE", help="Also write the measurements as JSON.")
    options = parser.parse_args(arguments)
    record = measure(options.folder)
    print(f"what the quickstart in {options.folder} has learned:\n")
    print("\n".join(f"  {line}" for line in record.lines))
    print(f"\nfigure: {options.folder / 'base' / 'figures' / 'loss.png'}")
    if options.record:
        write_json(options.record, asdict(record))


def measure(folder: Path) -> QuickstartRecord:
    """Return what the runs in a folder have measured."""
    base, instruct, preference = (read_metrics(folder / stage) for stage in STAGES)
    return QuickstartRecord(
        seconds={
            stage: lines[-1]["seconds"] for stage, lines in zip(STAGES, (base, instruct, preference), strict=True)
        },
        validation_loss=_change(base, "eval_loss"),
        bits_per_byte=_change(base, "eval_bits_per_byte"),
        compressors=compressors(),
        replies_that_end=_change(instruct, "answers_ended"),
        facts=_change(instruct, "basic-qa/exact_match"),
        unseen_capitals=_change(instruct, "capitals-unseen/exact_match"),
        reward_margin=_change(preference, "eval_rewards/margins"),
    )


def read_record(file: Path) -> QuickstartRecord:
    """Return a record that was written."""
    fields = json.loads(file.read_text(encoding="utf-8"))
    changes = {name: Change(**value) for name, value in fields.items() if "before" in value}
    return QuickstartRecord(**{**fields, **changes})


def compressors() -> dict[str, float]:
    """Return the bits per byte that gzip and token frequencies need for the corpus' held-out documents.

    gzip compresses each document alone, since the model sees no other document either. The frequencies are those of
    training documents, each token counted once more than it occurs.
    """
    tokenizer = build_tokenizer()
    held_out = [example.endings[0] for example in load_examples("pydocs-validation", tokenizer)]
    texts = [document.encode() for document in held_out]
    size = sum(map(len, texts))
    known = set(held_out)
    trained = [document for document in load_pydocs()["text"][: COUNTED + len(held_out)] if document not in known]
    counts = Counter(token for ids in encode_documents(trained[:COUNTED]) for token in ids.tolist())
    total = counts.total() + len(tokenizer)
    bits = -sum(math.log2((counts[token] + 1) / total) for ids in encode_documents(held_out) for token in ids.tolist())
    return {
        "gzip": 8 * sum(len(zlib.compress(text, 9)) for text in texts) / size,
        "token frequencies": bits / size,
    }


def _change(lines: Sequence[Mapping[str, float]], key: str) -> Change:
    measured = [line for line in lines if key in line]
    return Change(measured[0][key], measured[-1][key], measured[-1].get(f"{key}_stderr"))


def _shown(change: Change) -> str:
    return f"{round(change.before, 2) + 0.0:.2f} -> {change.after:.2f}"  # no "-0.00"


def _percent(change: Change) -> str:
    error = "" if change.stderr is None else f" ± {change.stderr:.0%}"
    return f"{change.before:.0%} -> {change.after:.0%}{error}"


if __name__ == "__main__":
    command_line(main)
