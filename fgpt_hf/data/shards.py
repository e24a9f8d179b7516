"""Prepared rows on a disk: a folder of shards that map into memory, and the data set on the Hub made of it.

The folder holds `prepared.json`, which says what the rows were made of, and `shard-00000/` and so on, each with
`train.arrow`, `validation.arrow` and `shard.json`. A token takes 2 bytes. A shard is complete or absent, and records
where in the corpus it ends, so that the next one can begin there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from datasets import Dataset, DatasetDict, concatenate_datasets
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from fgpt_hf.data.packing import Ids
from fgpt_hf.data.splits import SPLITS, TRAIN, Sizes, SplitSize
from fgpt_hf.data.stream import EpochPosition, PackedBuffer
from fgpt_hf.errors import UserError
from fgpt_hf.files import read_json
from fgpt_hf.retries import retry
from fgpt_hf.tokenizer.tokenizer import tokenizer_fingerprint

PREPARED = "prepared.json"
COLUMN = "input_ids"


@dataclass(frozen=True)
class ShardRecord:
    """A shard's sizes, and where in the corpus it ends: None at the end of the corpus. Written as `shard.json`."""

    sizes: Sizes
    end: EpochPosition | None

    @classmethod
    def read(cls, path: Path) -> "ShardRecord":
        """Return the record in a file; UserError if it is damaged."""
        fields = read_json(path)
        try:
            end = None if fields["end"] is None else EpochPosition.from_json(fields["end"])
            return cls(_sizes_from_json(fields["sizes"]), end)
        except (KeyError, TypeError, AttributeError) as error:
            raise _wrong_fields(path, error) from error


@dataclass(frozen=True)
class Recipe:
    """All that prepared rows follow from.

    Attributes:
        format: the version of this project's way of making rows.
        tokenizer: the fingerprint of the tokenizer.
        shards: a hash of the versions of the corpus's shards.
    """

    format: int
    tokenizer: str
    row_length: int
    validation_fraction: float
    dataset_name: str
    dataset_config_name: str | None
    text_column_name: str
    shards: str


@dataclass(frozen=True)
class Manifest:
    """The content of `prepared.json`: the recipe, and the sizes once the preparation has finished."""

    recipe: Recipe
    sizes: Sizes | None = None

    @property
    def is_finished(self) -> bool:
        return self.sizes is not None

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Return the manifest in a file; UserError if it is damaged."""
        fields = read_json(path)
        try:
            sizes = _sizes_from_json(fields.pop("sizes")) if fields.pop("finished") else None
            return cls(Recipe(**fields), sizes)
        except (KeyError, TypeError, AttributeError) as error:
            raise _wrong_fields(path, error) from error

    def as_json(self) -> dict[str, Any]:
        """Return the values as they stand in the file."""
        sizes = {} if self.sizes is None else {"sizes": {split: asdict(size) for split, size in self.sizes.items()}}
        return {**asdict(self.recipe), "finished": self.is_finished, **sizes}

    def __str__(self) -> str:
        assert self.sizes is not None
        train, length = self.sizes[TRAIN], self.recipe.row_length
        return f"{train.documents:,} documents of {self.recipe.dataset_name}, {describe_rows(train, length)}"


def describe_rows(size: SplitSize, row_length: int) -> str:
    """Return a phrase on the rows of a split.

    Example:
        >>> describe_rows(SplitSize(documents=3, tokens=990, rows=10, padding=7), row_length=100)
        '990 tokens in 10 rows of 100: none lost, 0.70% padding'
    """
    padding = size.padding / max(1, size.rows * row_length)
    return f"{size.tokens:,} tokens in {size.rows:,} rows of {row_length}: none lost, {padding:.2%} padding"


class PreparedRows:
    """The rows of a prepared folder or data set, mapped into memory."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset.with_format("numpy")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, indices: Sequence[int]) -> Ids:
        return np.asarray(self.dataset[indices][COLUMN], dtype=np.uint16)


@dataclass(frozen=True)
class PreparedData:
    """Finished rows by split, and what they were made of."""

    rows: Mapping[str, PreparedRows]
    manifest: Manifest


def is_prepared(folder: Path) -> bool:
    """Return whether a folder holds prepared rows, finished or not."""
    return (folder / PREPARED).is_file()


def load_prepared(folder: Path, row_length: int) -> PreparedData:
    """Return the rows of a prepared folder.

    Raises:
        UserError: they are of another tokenizer or length, a shard is damaged or missing, or the preparation is
            not finished.
    """
    manifest = Manifest.read(folder / PREPARED)
    require_fitting(str(folder), manifest, row_length)
    records = complete_shards(folder)
    if not manifest.is_finished:
        tokens = total_size(records)[TRAIN].tokens
        raise UserError(
            f"the preparation of {folder} is not finished: run `fgpt prepare` again to go on, or keep the {tokens:,} "
            f"tokens that are there with --max_train_tokens {tokens}"
        )
    if total_size(records) != manifest.sizes:
        raise UserError(f"{folder} lacks {shard_name(len(records))} or a later shard: run `fgpt prepare` again")
    return PreparedData({split: PreparedRows(_open_split(folder, len(records), split)) for split in SPLITS}, manifest)


def require_fitting(name: str, manifest: Manifest, row_length: int) -> None:
    """Raise UserError if rows are of another tokenizer or length than a run."""
    found = manifest.recipe
    if found.tokenizer != tokenizer_fingerprint():
        raise UserError(f"{name} was prepared with another tokenizer than GPT-2's with FGPT's control tokens")
    if found.row_length != row_length:
        raise UserError(
            f"{name} holds rows of {found.row_length} tokens and max_position_embeddings={row_length}: give "
            f"--max_position_embeddings {found.row_length}, or prepare the documents for {row_length}"
        )


def push_dataset(folder: Path, repo_id: str) -> None:
    """Upload the rows of a folder as a data set, which `train_base.py --dataset_name REPO_ID` reads.

    Raises:
        UserError: the Hub refuses it, or cannot be reached.
    """
    count = len(complete_shards(folder))
    rows = DatasetDict({split: _open_split(folder, count, split) for split in SPLITS})
    manifest = (folder / PREPARED).read_bytes()

    def upload_manifest() -> object:
        return HfApi().upload_file(
            path_or_fileobj=manifest, path_in_repo=PREPARED, repo_id=repo_id, repo_type="dataset"
        )

    try:
        retry(repo_id, lambda: rows.push_to_hub(repo_id))
        retry(repo_id, upload_manifest)
    except (HfHubHTTPError, ConnectionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{repo_id} could not be written to: {reason}. The rows are complete in {folder}") from error


def complete_shards(folder: Path) -> list[ShardRecord]:
    """Return the shards from the first one on, up to one that is missing or to the end of the corpus."""
    records: list[ShardRecord] = []
    while (path := folder / shard_name(len(records)) / "shard.json").is_file():
        records.append(ShardRecord.read(path))
        if records[-1].end is None:
            break
    return records


def total_size(records: Sequence[ShardRecord]) -> dict[str, SplitSize]:
    """Return the sizes of several shards together."""
    return {split: sum((record.sizes[split] for record in records), SplitSize()) for split in SPLITS}


def buffer_sizes(buffer: PackedBuffer) -> dict[str, SplitSize]:
    """Return the sizes of a buffer's splits."""
    return {
        split: SplitSize(buffer.documents[split], rows.tokens, len(rows.ids), rows.padding)
        for split, rows in buffer.rows.items()
    }


def shard_name(index: int) -> str:
    """Return the name of a shard's folder."""
    return f"shard-{index:05d}"


def _open_split(folder: Path, count: int, split: str) -> Dataset:
    datasets = []
    for path in (folder / shard_name(index) / f"{split}.arrow" for index in range(count)):
        try:
            datasets.append(Dataset.from_file(str(path)))
        except (OSError, pyarrow.ArrowInvalid) as error:
            raise UserError(f"{path} is damaged: delete {path.parent} and run `fgpt prepare` again") from error
    return concatenate_datasets(datasets)


def _sizes_from_json(sizes: Mapping[str, Mapping[str, int]]) -> dict[str, SplitSize]:
    return {split: SplitSize(**sizes[split]) for split in SPLITS}


def _wrong_fields(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} is damaged, or was written by another version of fgpt_hf: {error}")
