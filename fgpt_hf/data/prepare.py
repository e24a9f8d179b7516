"""Prepare rows: tokenize documents once, into shards on a disk, for runs that then read them at no cost.

A shard holds 134 million tokens, 256 MiB. An interrupted preparation resumes at the next shard, and gives the same rows
as one that was never interrupted, with any number of workers. Preparing takes 2 bytes of disk a token and a pass over
the corpus before the first step; a run with `--streaming` needs neither.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path

import pyarrow
from filelock import FileLock
from huggingface_hub.constants import HF_HOME

from fgpt_hf.config.option_groups import TextSource
from fgpt_hf.config.runs import Preparation
from fgpt_hf.data.corpora import Shard, open_corpus
from fgpt_hf.data.shards import (
    COLUMN,
    PREPARED,
    Manifest,
    Recipe,
    ShardRecord,
    buffer_sizes,
    complete_shards,
    describe_rows,
    is_prepared,
    push_dataset,
    shard_name,
    total_size,
)
from fgpt_hf.data.splits import SPLITS, TRAIN, SplitSize, empty_split_error
from fgpt_hf.data.stream import EpochPosition, PackedBuffer, TokenizerPool
from fgpt_hf.errors import UserError
from fgpt_hf.files import atomic_directory, sha256_of, write_json
from fgpt_hf.tokenizer.tokenizer import tokenizer_fingerprint

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1  # to be raised whenever the same documents would give other rows
SHARD_TOKENS = 1 << 27  # of training rows: a hundred billion tokens need fewer than a thousand files


def prepare_documents(preparation: Preparation) -> str:
    """Prepare rows as the flags of `fgpt prepare` say, and return its report.

    Raises:
        UserError: as `prepare` does, or the Hub refuses the data set.
    """
    folder = Path(preparation.output_dir)
    records = prepare(preparation, folder, preparation.max_train_tokens, in_processes=True)
    lines = [packing_report(records, preparation.max_position_embeddings)]
    if preparation.hub_dataset_id:
        push_dataset(folder, preparation.hub_dataset_id)
        lines.append(f"train on them with --dataset_name {preparation.hub_dataset_id}")
    return "\n".join([*lines, f"train on them with --dataset_name {folder}"])


def prepare(
    source: TextSource, folder: Path, max_train_tokens: int | None = None, in_processes: bool = False
) -> list[ShardRecord]:
    """Make the rows of all documents, or continue to, until about `max_train_tokens` are there.

    Of processes that want the same folder, one works and the others wait.

    Args:
        in_processes: tokenize in processes rather than threads, which pays for much text.

    Raises:
        UserError: the corpus cannot be read; the folder holds rows of another corpus, tokenizer, length or split; the
            disk is full, in which case complete shards stay.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        shards = open_corpus(source)
        recipe = recipe_of(source, shards)
        _require_recipe(folder, recipe)
        records = complete_shards(folder)
        if not _is_finished(records, max_train_tokens):
            write_json(folder / PREPARED, Manifest(recipe).as_json())
            workers = source.preprocessing_num_workers or os.cpu_count() or 1
            with closing(TokenizerPool(source, workers, in_processes=in_processes and workers > 1)) as pool:
                _add_shards(folder, records, pool, shards, max_train_tokens)
        sizes = total_size(records)
        for split in SPLITS:
            if not sizes[split].rows:
                raise empty_split_error(source.validation_fraction, split)
        write_json(folder / PREPARED, Manifest(recipe, sizes).as_json())
        return records


def prepared_once(source: TextSource) -> Path:
    """Return the folder in the cache with the rows of these documents, which are prepared if they are not there.

    The folder is below `fgpt/prepared` in `HF_HOME`; documents that have changed have another one.

    Raises:
        UserError: as `prepare` does.
    """
    key = sha256_of(repr(recipe_of(source, open_corpus(source))).encode())[:16]
    folder = Path(HF_HOME, "fgpt", "prepared", key)
    if not is_prepared(folder) or not Manifest.read(folder / PREPARED).is_finished:
        prepare(source, folder)
    return folder


def recipe_of(source: TextSource, shards: Sequence[Shard]) -> Recipe:
    """Return all that the rows of a corpus follow from."""
    return Recipe(
        format=FORMAT_VERSION,
        tokenizer=tokenizer_fingerprint(),
        row_length=source.max_position_embeddings,
        validation_fraction=source.validation_fraction,
        dataset_name=source.dataset_name,
        dataset_config_name=source.dataset_config_name,
        text_column_name=source.text_column_name,
        shards=sha256_of("\n".join(shard.version for shard in shards).encode()),
    )


def packing_report(records: Sequence[ShardRecord], row_length: int) -> str:
    """Return a line for each split: its documents, tokens, rows and padding."""
    return "\n".join(
        f"{split}: {size.documents:,} documents, {describe_rows(size, row_length)}"
        for split, size in total_size(records).items()
    )


def _add_shards(
    folder: Path,
    records: list[ShardRecord],
    pool: TokenizerPool,
    shards: Sequence[Shard],
    max_train_tokens: int | None,
) -> None:
    """Write the shards after those in `records`, and add each to them."""
    start = records[-1].end if records else EpochPosition()
    assert start is not None
    try:
        with closing(pool.packed_buffers(shards, start)) as buffers:
            while not _is_finished(records, max_train_tokens):
                tokens = total_size(records)[TRAIN].tokens
                enough = SHARD_TOKENS if max_train_tokens is None else min(SHARD_TOKENS, max_train_tokens - tokens)
                with atomic_directory(folder / shard_name(len(records))) as partial:
                    record = _write_shard(partial, buffers, pool.row_length, enough)
                records.append(record)
                tokens += record.sizes[TRAIN].tokens
                logger.info("%s: %d shards, %s tokens", folder, len(records), f"{tokens:,}")
    except OSError as error:
        raise UserError(_interrupted(folder, records, error)) from error


def _write_shard(folder: Path, buffers: Iterator[PackedBuffer], row_length: int, enough: int) -> ShardRecord:
    """Write buffers until the training split has `enough` tokens, or the corpus ends."""
    schema = pyarrow.schema({COLUMN: pyarrow.list_(pyarrow.uint16(), row_length)})
    sizes, end = dict.fromkeys(SPLITS, SplitSize()), None
    with ExitStack() as files:
        writers = {}
        for split in SPLITS:
            file = files.enter_context(pyarrow.OSFile(str(folder / f"{split}.arrow"), "wb"))
            writers[split] = files.enter_context(pyarrow.ipc.new_stream(file, schema))
        for buffer in buffers:
            for split, size in buffer_sizes(buffer).items():
                column = pyarrow.FixedSizeListArray.from_arrays(buffer.rows[split].ids.ravel(), row_length)
                writers[split].write_batch(pyarrow.record_batch([column], schema))
                sizes[split] += size
            if sizes[TRAIN].tokens >= enough:
                end = buffer.end
                break
    record = ShardRecord(sizes, end)
    write_json(folder / "shard.json", asdict(record))
    return record


def _interrupted(folder: Path, records: Sequence[ShardRecord], error: OSError) -> str:
    message = f"{folder} could not be written: {error}; free some space and run the same command again to go on"
    tokens = total_size(records)[TRAIN].tokens
    return f"{message}, or with --max_train_tokens {tokens} to keep what is there" if tokens else message


def _is_finished(records: Sequence[ShardRecord], max_train_tokens: int | None) -> bool:
    at_end = bool(records) and records[-1].end is None
    is_enough = max_train_tokens is not None and total_size(records)[TRAIN].tokens >= max_train_tokens
    return at_end or is_enough


def _require_recipe(folder: Path, recipe: Recipe) -> None:
    """Raise UserError if a folder holds rows of another recipe."""
    if not is_prepared(folder):
        return
    found, wanted = asdict(Manifest.read(folder / PREPARED).recipe), asdict(recipe)
    differing = next((name for name in wanted if found[name] != wanted[name]), None)
    if differing == "shards":
        raise UserError(
            f"{folder} holds rows of {recipe.dataset_name} from before its documents changed: choose another "
            "output_dir, or delete it"
        )
    if differing is not None:
        raise UserError(
            f"{folder} holds rows prepared with {differing}={found[differing]}, not {differing}={wanted[differing]}: "
            "choose another output_dir, or delete it"
        )
