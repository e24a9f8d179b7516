"""Read the rows of a mixture of datasets: conversations or preference pairs, with malformed rows counted and named.

One loop serves both kinds. Each row gets a fraction in [0, 1), by a hash of what it asks or of the document that it was
made from. The fraction decides whether the row is held out, so equal rows are never in both splits, whatever their
order. All rows are in memory at once, some kilobytes each; millions of conversations need tens of gigabytes.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any, TypeAlias, TypeVar

from datasets import Dataset

from fgpt_hf.config.data_options import BadRows, LongRows
from fgpt_hf.config.runs import TuningRun
from fgpt_hf.data.dataset_names import MixtureEntry, chosen_rows, parse_mixture, parse_validation_names
from fgpt_hf.data.local_files import is_local
from fgpt_hf.data.local_rows import LocalRows, sample_local_rows
from fgpt_hf.data.sources import DatasetRegistry, load_rows
from fgpt_hf.data.splits import HELD_OUT, times_an_epoch, validation_threshold
from fgpt_hf.errors import UserError
from fgpt_hf.retries import reading

DatasetRow: TypeAlias = Mapping[str, Any]  # a row of a dataset, by column
LoadedRows: TypeAlias = Dataset | LocalRows

SHOWN = 5  # rows that are named for each issue


@dataclass(frozen=True, kw_only=True)
class MixtureRow:
    """A row that was read.

    Attributes:
        row_id: its name in messages, "row 7 of smol-smoltalk".
        hash_fraction: a hash in [0, 1); the rows of the smallest ones are held out.
        repeats: how often an epoch has it, on average.
        is_derived: whether the hash is that of a document that other datasets are made from too.
        is_validation: whether it is of a dataset that is for validation.
    """

    row_id: str
    hash_fraction: float
    repeats: float = 1.0
    is_derived: bool = False
    is_validation: bool = False

    @property
    def times_an_epoch(self) -> int:
        """How often an epoch has this row: see `splits.times_an_epoch`.

        Example:
            >>> MixtureRow(row_id="row 7 of chats", hash_fraction=0.5, repeats=3.0).times_an_epoch
            3
        """
        return times_an_epoch(self.row_id, self.repeats)


ReadRow = TypeVar("ReadRow", bound=MixtureRow)
Encoding = TypeVar("Encoding")
# Reads a row, given its id and its repeats; raises UserError if the row is malformed.
RowReader: TypeAlias = Callable[[DatasetRow, str, float], ReadRow]
# Given the name and the rows of a dataset, returns the rows to read and their reader.
OpenReader: TypeAlias = Callable[[str, LoadedRows], tuple[LoadedRows, RowReader[ReadRow]]]
# Rows with what was made from each: those to train on, and those to hold out.
Splits: TypeAlias = tuple[list[tuple[ReadRow, Encoding]], list[tuple[ReadRow, Encoding]]]


class RowIssues:
    """The malformed or long rows of a mixture, by what was done with them and why.

    Example:
        >>> issues = RowIssues()
        >>> issues.add("row 7 of chats", "no message is the assistant's", "skip")
        >>> print(issues)
        1 left out, no message is the assistant's: row 7 of chats
    """

    def __init__(self) -> None:
        self._rows: dict[tuple[str, str], list[str]] = defaultdict(list)

    def add(self, row_id: str, reason: str, policy: BadRows | LongRows) -> None:
        """Count a row; UserError if the policy refuses such rows."""
        if policy == "refuse":
            raise UserError(f"{row_id}: {reason}")
        self._rows[{"skip": "left out", "cut": "cut"}[policy], reason].append(row_id)

    def __len__(self) -> int:
        return sum(map(len, self._rows.values()))

    def __str__(self) -> str:
        """Return a line for each reason, which counts its rows and names the first ones."""
        return "\n".join(
            f"{len(rows):,} {done}, {reason}: {', '.join(rows[:SHOWN])}{', …' if len(rows) > SHOWN else ''}"
            for (done, reason), rows in self._rows.items()
        )


def local_samples(run: TuningRun, registry: DatasetRegistry) -> Iterator[tuple[str, LocalRows]]:
    """Yield the name of each dataset of a run on this machine, and the first rows of its files.

    Raises:
        UserError: there are no such files, or they cannot be read.
    """
    for entry in parse_mixture(run.dataset_name) + parse_validation_names(run.validation_dataset):
        if entry.name not in registry.names and is_local(entry.name):
            yield entry.name, sample_local_rows(entry.name, run.encoding)


def read_mixture(
    run: TuningRun,
    registry: DatasetRegistry,
    open_reader: OpenReader[ReadRow],
    issues: RowIssues,
) -> list[ReadRow]:
    """Return the rows of all datasets in `run.dataset_name`, and then those of `run.validation_dataset`.

    Malformed ones are added to `issues`.

    Args:
        open_reader: given the name and the rows of a dataset, returns the rows to read and their reader; UserError if
            its columns hold no such rows.

    Raises:
        UserError: a dataset cannot be opened, or a malformed row is refused.
    """
    names = [(entry, run.dataset_train_split) for entry in parse_mixture(run.dataset_name)]
    held_out = [(entry, None) for entry in parse_validation_names(run.validation_dataset)]
    return [
        *_read_entries(run, names, registry, open_reader, issues),
        *(replace(row, is_validation=True) for row in _read_entries(run, held_out, registry, open_reader, issues)),
    ]


def _read_entries(
    run: TuningRun,
    entries: Sequence[tuple[MixtureEntry, str | None]],
    registry: DatasetRegistry,
    open_reader: OpenReader[ReadRow],
    issues: RowIssues,
) -> list[ReadRow]:
    """Return the rows of datasets, of which each is given with the split that `load_rows` takes."""
    found = []
    seen: set[bytes] = set()
    for (name, max_rows, repeats), split in entries:
        loaded = load_rows(registry, name, split, run.dataset_config_name, run.dataset_revision, run.encoding)
        rows, read = open_reader(name, loaded)
        indices = chosen_rows(max_rows, len(rows))
        rows = rows.select(indices)
        row_ids = rows.row_ids if isinstance(rows, LocalRows) else [f"row {index} of {name}" for index in indices]
        with reading(name):
            for row_id, row in zip(row_ids, rows, strict=True):
                try:
                    each = read(row, row_id, repeats)
                except UserError as error:
                    issues.add(row_id, str(error), run.bad_rows)
                    continue
                if isinstance(rows, LocalRows) and _is_known(each, seen):
                    issues.add(row_id, "a repetition of an earlier row", "skip")
                else:
                    found.append(each)
    return found


def _is_known(row: MixtureRow, seen: set[bytes]) -> bool:
    """Return whether a row with this content was seen, and remember it."""
    content = [value for name, value in vars(row).items() if name not in MixtureRow.__dataclass_fields__]
    digest = blake2b(repr(content).encode("utf-8", "surrogatepass"), digest_size=16).digest()
    known = digest in seen
    seen.add(digest)
    return known


def split_rows(
    rows: Sequence[tuple[ReadRow, Encoding]], run: TuningRun, kind: str, issues: RowIssues
) -> Splits[ReadRow, Encoding]:
    """Return the rows to train on and those to hold out, each with what was made from it.

    The rows of the smallest hashes are held out: `run.validation_fraction` of them, but at least one, and none with 0.
    Rows that are derived from documents are held out with these: if their hash is below the fraction. With a
    `run.validation_dataset`, its rows are held out, and the others with the hash of one of them are left out.

    Args:
        kind: what a row is in the message, "conversations".

    Raises:
        UserError: no row can be used, or one of the two would be empty, though some rows should be held out.
    """
    because = f": {'; '.join(str(issues).splitlines())}" if len(issues) else ""
    if not rows:
        raise UserError(f"{run.dataset_name} holds no {kind} that can be used{because}")
    given, fraction = run.validation_dataset, run.validation_fraction
    train, validation = _by_dataset(rows, issues) if given else _by_hash(rows, fraction)
    if not train or ((given or fraction) and not validation):
        raise UserError(
            f"{run.dataset_name} with {f'validation_dataset={given}' if given else f'validation_fraction={fraction}'} "
            f"gives {len(train)} {kind} to train on and {len(validation)} to hold out, and both are needed; "
            f"--validation_fraction 0 holds none out{because}"
        )
    return train, validation


def _by_dataset(rows: Sequence[tuple[ReadRow, Encoding]], issues: RowIssues) -> Splits[ReadRow, Encoding]:
    """Return the rows to train on and those of the validation set, without any of the former that is in the latter."""
    validation = [item for item in rows if item[0].is_validation]
    hashes = {row.hash_fraction for row, _ in validation}
    train = []
    for item in rows:
        if item[0].is_validation:
            continue
        if item[0].hash_fraction in hashes:
            issues.add(item[0].row_id, HELD_OUT, "skip")
        else:
            train.append(item)
    return train, validation


def _by_hash(rows: Sequence[tuple[ReadRow, Encoding]], fraction: float) -> Splits[ReadRow, Encoding]:
    """Return the rows to train on, and those of the smallest hashes."""
    own = validation_threshold((row.hash_fraction for row, _ in rows if not row.is_derived), fraction)
    train, validation = _divide(rows, lambda row: fraction if row.is_derived else own)
    if fraction and not (train and validation):
        threshold = validation_threshold((row.hash_fraction for row, _ in rows), fraction)
        train, validation = _divide(rows, lambda row: threshold)
    return train, validation


def _divide(
    rows: Sequence[tuple[ReadRow, Encoding]], threshold: Callable[[ReadRow], float]
) -> Splits[ReadRow, Encoding]:
    """Return the rows whose hash is at least the threshold for them, and the others."""
    train: list[tuple[ReadRow, Encoding]] = []
    validation: list[tuple[ReadRow, Encoding]] = []
    for item in rows:
        (validation if item[0].hash_fraction < threshold(item[0]) else train).append(item)
    return train, validation
