"""What prepared rows were made from, and what each of their files holds: `prepared.json` and `shard.json`.

Each file ends with a hash of itself and names the hashes of the rows, so that any change is noticed.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fgpt_hf.data.splits import SPLITS, TRAIN, Sizes, SplitSize
from fgpt_hf.data.stream import EpochPosition
from fgpt_hf.errors import UserError
from fgpt_hf.files import read_sealed_json, sha256_of
from fgpt_hf.wording import count_of

PREPARED, RECORD = "prepared.json", "shard.json"


@dataclass(frozen=True)
class Recipe:
    """All that prepared rows follow from.

    Attributes:
        format: the version of this project's way of making rows, and of the folder that holds them.
        tokenizer: the fingerprint of the tokenizer.
        shards: a hash of the versions of the corpus's shards.
    """

    format: int
    tokenizer: str
    row_length: int
    validation_fraction: float
    validation_dataset: str | None
    dataset_name: str
    dataset_config_name: str | None
    text_column_name: str | None
    shards: str

    @property
    def fingerprint(self) -> str:
        """A hash of all but the names, since `shards` stands for the documents wherever they lie."""
        names = ("dataset_name", "dataset_config_name", "validation_dataset")
        return sha256_of(repr([item for item in asdict(self).items() if item[0] not in names]).encode())


@dataclass(frozen=True)
class FileRecord:
    """The size and the hash of a file."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> "FileRecord":
        """Return the record of a file as it is."""
        return cls(path.stat().st_size, sha256_of(path))


@dataclass(frozen=True)
class ShardRecord:
    """What a shard holds. Written as `shard.json`.

    Attributes:
        recipe: the fingerprint of the recipe that it was made by.
        begin: where in the corpus it begins.
        end: where it ends; None at the end of the corpus.
        sizes: the size of each split.
        files: the file of each split.
    """

    recipe: str
    begin: EpochPosition
    end: EpochPosition | None
    sizes: Sizes
    files: Mapping[str, FileRecord]

    @classmethod
    def read(cls, path: Path) -> "ShardRecord":
        """Return the record in a file; UserError if it is damaged."""
        fields = read_sealed_json(path)
        try:
            begin = EpochPosition.from_json(fields["begin"])
            end = None if fields["end"] is None else EpochPosition.from_json(fields["end"])
            files = {split: FileRecord(**fields["files"][split]) for split in SPLITS}
            return cls(fields["recipe"], begin, end, _sizes_from_json(fields["sizes"]), files)
        except (KeyError, TypeError, AttributeError) as error:
            raise _wrong_fields(path, error) from error


@dataclass(frozen=True)
class Manifest:
    """The content of `prepared.json`: the recipe and, once the preparation has finished, what it made.

    Attributes:
        sizes: the size of each split.
        content: a hash of all rows.
    """

    recipe: Recipe
    sizes: Sizes | None = None
    content: str | None = None

    @classmethod
    def of(cls, recipe: Recipe, records: Sequence[ShardRecord]) -> "Manifest":
        """Return the manifest of a finished preparation."""
        return cls(recipe, total_size(records), content_hash(records))

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Return the manifest in a file; UserError if it is missing or damaged."""
        if not path.exists():
            raise UserError(f"{path} is missing: run `fgpt prepare` again, which rewrites it")
        fields = read_sealed_json(path)
        try:
            made = fields.pop("made")
            recipe = Recipe(**fields)
            return cls(recipe) if made is None else cls(recipe, _sizes_from_json(made["sizes"]), made["content"])
        except (KeyError, TypeError, AttributeError) as error:
            raise _wrong_fields(path, error) from error

    def as_json(self) -> dict[str, Any]:
        """Return the values as they stand in the file."""
        if self.sizes is None:
            return {**asdict(self.recipe), "made": None}
        sizes = {split: asdict(size) for split, size in self.sizes.items()}
        return {**asdict(self.recipe), "made": {"sizes": sizes, "content": self.content}}

    def __str__(self) -> str:
        assert self.sizes is not None
        train, length = self.sizes[TRAIN], self.recipe.row_length
        return f"{count_of(train.documents, 'document')} of {self.recipe.dataset_name}, {describe_rows(train, length)}"


def describe_rows(size: SplitSize, row_length: int) -> str:
    """Return a phrase on the rows of a split.

    Example:
        >>> describe_rows(SplitSize(documents=3, tokens=990, rows=10, padding=7), row_length=100)
        '990 tokens in 10 rows of 100: none lost, 0.70% padding'
        >>> describe_rows(SplitSize(documents=40, tokens=989, rows=10, padding=7, cut=1), row_length=100)
        '989 tokens in 10 rows of 100: none lost, 0.70% padding, 2.50% of the documents cut to fill rows'
    """
    padding = size.padding / max(1, size.rows * row_length)
    cut = f", {size.cut / size.documents:.2%} of the documents cut to fill rows" if size.cut else ""
    rows = f"{count_of(size.rows, 'row')} of {row_length}"
    return f"{count_of(size.tokens, 'token')} in {rows}: none lost, {padding:.2%} padding{cut}"


def total_size(records: Sequence[ShardRecord]) -> dict[str, SplitSize]:
    """Return the sizes of several shards together."""
    return {split: sum((record.sizes[split] for record in records), SplitSize()) for split in SPLITS}


def content_hash(records: Sequence[ShardRecord]) -> str:
    """Return a hash of the rows of all splits of several shards."""
    hashes = [record.files[split].sha256 for record in records for split in SPLITS]
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def _sizes_from_json(sizes: Mapping[str, Mapping[str, int]]) -> dict[str, SplitSize]:
    return {split: SplitSize(**sizes[split]) for split in SPLITS}


def _wrong_fields(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} is damaged, or was written by another version of fgpt_hf: {error}")
