"""Prepared rows on a disk: a folder of shards that map into memory, and the dataset on the Hub made from it.

The folder holds `prepared.json`, which says what the rows were made from, and `shard-00000/` and so on, each with
`train.arrow`, `validation.arrow` and `shard.json`. A token takes 2 bytes, or 4 where the vocabulary has more than
65,536. A shard is complete or absent, and records where in the corpus it begins and ends, so that the next one can
begin there, and the size and hash of its files. Whatever is damaged, missing or exchanged is named: records and sizes
are checked when a folder is opened, and the content, a gigabyte a second, by a background thread.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow
from datasets import Dataset, DatasetDict, List, Value, concatenate_datasets
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from fgpt_hf.data.shard_records import PREPARED, RECORD, FileRecord, Manifest, Recipe, ShardRecord, total_size
from fgpt_hf.data.splits import SPLITS, TRAIN, SplitSize
from fgpt_hf.data.stream import EpochPosition, PackedBuffer
from fgpt_hf.errors import UserError, one_line
from fgpt_hf.retries import retry
from fgpt_hf.tokenizer.byte_bpe import Ids
from fgpt_hf.tokenizer.document_encoder import PROJECT_ENCODER, DocumentEncoder
from fgpt_hf.workers import BackgroundCheck

COLUMN = "input_ids"
ANY_SHARD = "shard-*"
HOW_TO_MEND = "run `fgpt prepare` again, which rebuilds {}"
SECONDS_TO_CHECK = 5.0  # of checking the content of rows before a run starts; the rest continues while it trains


class PreparedRows:
    """The rows of a prepared folder or dataset, mapped into memory.

    Args:
        fingerprint: a hash of the rows.
        check: what is still being checked; what it finds is raised by the next reading of rows.
    """

    def __init__(self, dataset: Dataset, fingerprint: str, check: BackgroundCheck | None = None) -> None:
        self.dataset, self.fingerprint, self.check = dataset.with_format("numpy"), fingerprint, check

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, indices: Sequence[int]) -> Ids:
        if self.check is not None:
            self.check.wait(seconds=0)
        stored = self.dataset.features[COLUMN].feature.dtype  # which datasets widens when it reads
        ids: Ids = np.asarray(self.dataset[indices][COLUMN], dtype=stored)
        return ids


@dataclass(frozen=True)
class PreparedData:
    """Finished rows by split, and what they were made from."""

    rows: Mapping[str, PreparedRows]
    manifest: Manifest


def is_prepared(folder: Path) -> bool:
    """Return whether a folder holds prepared rows, finished or not, whole or damaged."""
    return any(any(folder.glob(name)) for name in (PREPARED, f"{ANY_SHARD}/{RECORD}", f"{ANY_SHARD}/{TRAIN}.arrow"))


def load_prepared(
    folder: Path, row_length: int, verify: bool = True, encoder: DocumentEncoder = PROJECT_ENCODER
) -> PreparedData:
    """Return the rows of a prepared folder.

    Args:
        verify: hash all files in a thread, which reading rows does not wait for once `SECONDS_TO_CHECK` are over.

    Raises:
        UserError: they are of another tokenizer or length, a shard is damaged or missing, or the preparation is
            not finished.
    """
    manifest = Manifest.read(folder / PREPARED)
    require_fitting(str(folder), manifest, row_length, encoder)
    records = complete_shards(folder, manifest.recipe)
    if manifest.sizes is None:
        tokens = total_size(records)[TRAIN].tokens
        raise UserError(
            f"the preparation of {folder} is not finished: run `fgpt prepare` again to continue, or keep the "
            f"{tokens:,} tokens that are there with --max_train_tokens {tokens}"
        )
    if Manifest.of(manifest.recipe, records) != manifest:
        raise UserError(f"{folder} lacks {shard_name(len(records))} or a later shard: run `fgpt prepare` again")
    check = BackgroundCheck(lambda: verify_contents(folder, records)) if verify else None
    if check is not None:
        check.wait(SECONDS_TO_CHECK)
    datasets = {split: _open_split(folder, records, split, row_length) for split in SPLITS}
    rows = {split: PreparedRows(dataset, str(manifest.content), check) for split, dataset in datasets.items()}
    return PreparedData(rows, manifest)


def require_fitting(name: str, manifest: Manifest, row_length: int, encoder: DocumentEncoder = PROJECT_ENCODER) -> None:
    """Raise UserError if rows are of another tokenizer or length than a run, or were made by another version."""
    found = manifest.recipe
    if found.tokenizer != encoder.fingerprint:
        own = "GPT-2's with FGPT's control tokens" if encoder == PROJECT_ENCODER else "that of the run's model"
        raise UserError(
            f"{name} was prepared with another tokenizer than {own}: prepare it with --tokenizer, by the model's name"
        )
    if found.row_length != row_length:
        raise UserError(
            f"{name} holds rows of {found.row_length} tokens and max_position_embeddings={row_length}: give "
            f"--max_position_embeddings {found.row_length}, or prepare the documents for {row_length}"
        )


def push_dataset(folder: Path, repo_id: str) -> None:
    """Upload the rows of a folder as a dataset, which `train_base.py --dataset_name REPO_ID` reads.

    Raises:
        UserError: the Hub refuses it, or cannot be reached.
    """
    recipe = Manifest.read(folder / PREPARED).recipe
    records = complete_shards(folder, recipe)
    splits = [split for split, size in total_size(records).items() if size.rows]  # the Hub has no empty ones
    rows = DatasetDict({split: _open_split(folder, records, split, recipe.row_length) for split in splits})
    manifest = (folder / PREPARED).read_bytes()

    def upload_manifest() -> object:
        return HfApi().upload_file(
            path_or_fileobj=manifest, path_in_repo=PREPARED, repo_id=repo_id, repo_type="dataset"
        )

    try:
        retry(repo_id, lambda: rows.push_to_hub(repo_id))
        retry(repo_id, upload_manifest)
    except (HfHubHTTPError, ConnectionError) as error:
        raise UserError(
            f"{repo_id} could not be written to: {one_line(error)}. The rows are complete in {folder}"
        ) from error


def complete_shards(folder: Path, recipe: Recipe) -> list[ShardRecord]:
    """Return the shards from the first one on, up to one that is missing or to the end of the corpus.

    Raises:
        UserError: a shard is damaged, or of another preparation.
    """
    records: list[ShardRecord] = []
    begin: EpochPosition | None = EpochPosition()
    while begin is not None and (shard := folder / shard_name(len(records))).exists():
        records.append(read_shard(shard, recipe, begin))
        begin = records[-1].end
    return records


def read_shard(shard: Path, recipe: Recipe, begin: EpochPosition) -> ShardRecord:
    """Return the record of a shard that begins at a position, and whose files have their recorded sizes.

    Raises:
        UserError: it is damaged, or it is another shard.
    """
    remedy = HOW_TO_MEND.format(shard)
    if not (shard / RECORD).is_file():
        raise UserError(f"{shard / RECORD} is missing: {remedy}")
    record = ShardRecord.read(shard / RECORD)
    if record.recipe != recipe.fingerprint:
        raise UserError(f"{shard} holds rows of other documents, or rows made in another way: {remedy}")
    if record.begin != begin:
        raise UserError(f"{shard} does not begin where the shard before it ends, so it is another one: {remedy}")
    for split in SPLITS:
        path, size = split_path(shard, split), record.files[split].bytes
        if not path.is_file():
            raise UserError(f"{path} is missing: {remedy}")
        if path.stat().st_size != size:
            raise UserError(
                f"{path} is damaged: it has {path.stat().st_size:,} bytes and should have {size:,}; {remedy}"
            )
    return record


def verify_contents(folder: Path, records: Sequence[ShardRecord]) -> None:
    """Hash all files of all shards; UserError for the first one that has changed since it was written."""
    for number, record in enumerate(records):
        verify_content(folder / shard_name(number), record)


def verify_content(shard: Path, record: ShardRecord) -> None:
    """Hash the files of a shard; UserError if one has changed since it was written."""
    for split in SPLITS:
        path = split_path(shard, split)
        if FileRecord.of(path) != record.files[split]:
            raise UserError(
                f"{path} is damaged: its content does not have the hash in {RECORD}; {HOW_TO_MEND.format(shard)}"
            )


def buffer_sizes(buffer: PackedBuffer) -> dict[str, SplitSize]:
    """Return the sizes of a buffer's splits."""
    return {
        split: SplitSize(buffer.documents[split], rows.tokens, len(rows.ids), rows.padding, rows.cut)
        for split, rows in buffer.rows.items()
    }


def shard_name(index: int) -> str:
    """Return the name of a shard's folder."""
    return f"shard-{index:05d}"


def split_path(shard: Path, split: str) -> Path:
    """Return the file of a split in a shard's folder."""
    return shard / f"{split}.arrow"


def require_rows(name: str, dataset: Dataset, count: int, row_length: int) -> None:
    """Raise UserError if a dataset does not hold this many rows of this many token ids."""
    column = dataset.features.get(COLUMN)
    is_row = isinstance(column, List) and column.length == row_length
    is_ids = is_row and column.feature in (Value("uint16"), Value("uint32"))
    if not is_ids or len(dataset) != count:
        raise UserError(f"{name} is damaged: it does not hold {count:,} rows of {row_length} token ids")


def _open_split(folder: Path, records: Sequence[ShardRecord], split: str, row_length: int) -> Dataset:
    datasets = []
    for number, record in enumerate(records):
        path = split_path(folder / shard_name(number), split)
        try:
            datasets.append(Dataset.from_file(str(path)))
        except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as error:
            raise UserError(f"{path} is damaged: {HOW_TO_MEND.format(path.parent)}") from error
        require_rows(str(path), datasets[-1], record.sizes[split].rows, row_length)
    return concatenate_datasets(datasets)
