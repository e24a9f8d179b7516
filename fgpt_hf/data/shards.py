"""A folder of prepared rows: token ids that map into memory, and the data set on the Hub that is made of it.

It holds `prepared.json`, which says what the rows are made of and how, and `shard-00000/` and so on, each with
`train.arrow`, `validation.arrow` and `shard.json`. A shard is whole or not there; the next one begins where it ends.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from datasets import Dataset, DatasetDict, concatenate_datasets
from huggingface_hub import HfApi

from fgpt_hf.data.packing import Ids, compare_packings
from fgpt_hf.data.stream import SPLITS, TRAIN, PackedBuffer, Position
from fgpt_hf.errors import UserError
from fgpt_hf.files import read_json
from fgpt_hf.retries import retry
from fgpt_hf.tokenizer.tokenizer import tokenizer_fingerprint

PREPARED = "prepared.json"
COLUMN = "input_ids"


@dataclass
class ShardRecord:
    """What a shard holds, by split, and where in the corpus it ends: None at the end of the corpus."""

    end: Position | None = None
    rows: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    documents: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    padding: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    compare_packings: dict[str, list[int]] = field(default_factory=dict)  # of the corpus's first window, by packing

    def add(self, window: PackedBuffer, row_length: int) -> None:
        for split in SPLITS:
            self.rows[split] += len(window.rows[split].ids)
            self.documents[split] += len(window.lengths[split])
            self.tokens[split] += window.rows[split].tokens
            self.padding[split] += window.rows[split].padding
        self.end = window.end
        if window.begin["window"] == 0:
            self.accounts = {
                name: list(account) for name, account in compare_packings(window.lengths[TRAIN], row_length).items()
            }


class PreparedRows:
    """The rows of a prepared folder or data set, mapped into memory."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset.with_format("numpy")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, numbers: Sequence[int]) -> Ids:
        return np.asarray(self.dataset[numbers][COLUMN], dtype=np.uint16)


def is_prepared(folder: Path) -> bool:
    return (folder / PREPARED).is_file()


def summary(recipe: dict[str, Any]) -> str:
    """What finished rows hold, from what `prepared.json` says of them."""
    train, length = recipe["sizes"][TRAIN], recipe["row_length"]
    share = train["padding"] / (train["rows"] * length)
    return (
        f"{train['documents']:,} documents of {recipe['dataset_name']}, {train['tokens']:,} tokens in "
        f"{train['rows']:,} rows of {length}: none lost, {share:.2%} padding"
    )


def origin(recipe: dict[str, Any]) -> dict[str, Any]:
    """What finished rows were made of: `source`, the text, and `data`, its documents, tokens and rows by split."""
    source = {name: recipe[name] for name in ("dataset_name", "dataset_config_name", "validation_fraction")}
    return {"source": source, "data": recipe["sizes"]}


def load_prepared(folder: Path, row_length: int) -> tuple[dict[str, PreparedRows], dict[str, Any]]:
    """The rows of a prepared folder by split, and the content of its `prepared.json`.

    Raises:
        UserError: they are of another tokenizer or length; a shard is damaged; the preparation is not finished.
    """
    recipe = read_json(folder / PREPARED)
    require_fitting(str(folder), recipe, row_length)
    records = whole_shards(folder)
    if not recipe["finished"]:
        tokens = total_tokens(records, "tokens", TRAIN)
        raise UserError(
            f"the preparation of {folder} is not finished: run `fgpt prepare` again to go on, or keep the {tokens:,} "
            f"tokens that are there with --max_train_tokens {tokens}"
        )
    return {split: PreparedRows(_split(folder, len(records), split)) for split in SPLITS}, recipe


def require_fitting(name: str, recipe: dict[str, Any], row_length: int) -> None:
    """Raise UserError if rows are of another tokenizer or length than a run."""
    if recipe["tokenizer"] != tokenizer_fingerprint():
        raise UserError(f"{name} was prepared with another tokenizer than GPT-2's with FGPT's control tokens")
    if recipe["row_length"] != row_length:
        raise UserError(
            f"{name} holds rows of {recipe['row_length']} tokens and max_position_embeddings={row_length}: give "
            f"--max_position_embeddings {recipe['row_length']}, or prepare the documents for {row_length}"
        )


def push_dataset(folder: Path, repo_id: str) -> None:
    """Make the rows of a folder a data set on the Hub, as `train_base.py --dataset_name REPO_ID` takes it.

    Raises:
        OSError: the Hub refuses it, or cannot be reached.
    """
    count = len(whole_shards(folder))
    rows = DatasetDict({split: _split(folder, count, split) for split in SPLITS})
    retry(repo_id, lambda: rows.push_to_hub(repo_id))
    recipe = (folder / PREPARED).read_bytes()
    retry(
        repo_id,
        lambda: HfApi().upload_file(
            path_or_fileobj=recipe, path_in_repo=PREPARED, repo_id=repo_id, repo_type="dataset"
        ),
    )


def whole_shards(folder: Path) -> list[ShardRecord]:
    """The shards from the first one on, up to one that is missing or to the end of the corpus."""
    records: list[ShardRecord] = []
    while (path := folder / shard_name(len(records)) / "shard.json").is_file():
        records.append(ShardRecord(**read_json(path)))
        if records[-1].end is None:
            break
    return records


def _split(folder: Path, count: int, split: str) -> Dataset:
    paths = [folder / shard_name(number) / f"{split}.arrow" for number in range(count)]
    datasets = []
    for path in paths:
        try:
            datasets.append(Dataset.from_file(str(path)))
        except (OSError, pyarrow.ArrowInvalid) as error:
            raise UserError(f"{path} is damaged: delete {path.parent} and run `fgpt prepare` again") from error
    return concatenate_datasets(datasets)


def total_tokens(records: Sequence[ShardRecord], name: str, split: str) -> int:
    return sum(getattr(record, name)[split] for record in records)


def shard_name(number: int) -> str:
    return f"shard-{number:05d}"
