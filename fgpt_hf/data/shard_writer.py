"""Write the shards of a preparation, from documents to files on a disk."""

import logging
import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow

from fgpt_hf.config.data_options import TextSource
from fgpt_hf.data.corpora import Shard
from fgpt_hf.data.shard_records import PREPARED, RECORD, FileRecord, Manifest, Recipe, ShardRecord, total_size
from fgpt_hf.data.shards import (
    COLUMN,
    HOW_TO_MEND,
    buffer_sizes,
    read_shard,
    shard_name,
    split_path,
    verify_content,
)
from fgpt_hf.data.splits import SPLITS, TRAIN, SplitSize
from fgpt_hf.data.stream import EpochPosition, PackedBuffer, TokenizerPool
from fgpt_hf.data.validation_rule import validation_rule
from fgpt_hf.errors import UserError
from fgpt_hf.files import PARTIAL, atomic_directory, remove, write_sealed_json
from fgpt_hf.tokenizer.document_encoder import DocumentEncoder
from fgpt_hf.wording import count_of

logger = logging.getLogger(__name__)

SHARD_TOKENS = 1 << 27  # of training rows: a hundred billion tokens need fewer than a thousand files


class ShardWriter:
    """The making of one folder's shards: keeps those that are whole, and writes the others."""

    def __init__(
        self,
        source: TextSource,
        folder: Path,
        shards: Sequence[Shard],
        recipe: Recipe,
        in_processes: bool,
        encoder: DocumentEncoder,
    ) -> None:
        self.source, self.folder, self.shards, self.recipe, self.encoder = source, folder, shards, recipe, encoder
        self.workers = source.preprocessing_num_workers or os.cpu_count() or 1
        self.in_processes = in_processes and self.workers > 1
        self.records: list[ShardRecord] = []
        self._buffers: Generator[PackedBuffer, None, None] | None = None

    def run(self, max_train_tokens: int | None) -> list[ShardRecord]:
        """Return the records of all shards, until there are enough tokens or the corpus ends."""
        for unfinished in self.folder.glob(f"*{PARTIAL}"):
            remove(unfinished)
        with ExitStack() as resources:
            pool: TokenizerPool | None = None
            while (begin := self._next_begin()) is not None:
                if (kept := self._kept(begin)) is not None:
                    self._close_buffers()
                    self.records.append(kept)
                    continue
                tokens = total_size(self.records)[TRAIN].tokens
                enough = SHARD_TOKENS if max_train_tokens is None else min(SHARD_TOKENS, max_train_tokens - tokens)
                if enough <= 0:
                    break
                if pool is None:
                    write_sealed_json(self.folder / PREPARED, Manifest(self.recipe).as_json())
                    rule = validation_rule(self.source, self.shards)
                    pool = TokenizerPool(self.source, self.workers, self.in_processes, rule, self.encoder)
                    resources.enter_context(closing(pool))
                    resources.callback(self._close_buffers)
                self._write(pool, begin, enough)
        return self.records

    def _next_begin(self) -> EpochPosition | None:
        return self.records[-1].end if self.records else EpochPosition()

    def _kept(self, begin: EpochPosition) -> ShardRecord | None:
        """Return the record of the next shard if it is there, unchanged since it was written."""
        shard = self.folder / shard_name(len(self.records))
        if not shard.exists():
            return None
        try:
            record = read_shard(shard, self.recipe, begin)
            verify_content(shard, record)
            return record
        except UserError as error:
            logger.warning("%s", str(error).replace(HOW_TO_MEND.format(shard), "it is made again"))
            remove(shard)
            return None

    def _write(self, pool: TokenizerPool, begin: EpochPosition, enough: int) -> None:
        """Write the next shard, and add its record."""
        if self._buffers is None:
            self._buffers = pool.packed_buffers(self.shards, begin)
        try:
            with atomic_directory(self.folder / shard_name(len(self.records))) as partial:
                self.records.append(
                    _write_shard(partial, self._buffers, self.recipe, begin, enough, self.encoder.dtype)
                )
        except OSError as error:
            raise UserError(_interrupted(self.folder, self.records, error)) from error
        tokens = total_size(self.records)[TRAIN].tokens
        made = count_of(len(self.records), "shard"), count_of(tokens, "token")
        logger.info("%s: %s, %s", self.folder, *made)

    def _close_buffers(self) -> None:
        if self._buffers is not None:
            self._buffers.close()
            self._buffers = None


def _write_shard(
    folder: Path,
    buffers: Iterator[PackedBuffer],
    recipe: Recipe,
    begin: EpochPosition,
    enough: int,
    dtype: np.dtype[Any],
) -> ShardRecord:
    """Write buffers until the training split has `enough` tokens, or the corpus ends."""
    schema = pyarrow.schema({COLUMN: pyarrow.list_(pyarrow.from_numpy_dtype(dtype), recipe.row_length)})
    sizes, end = dict.fromkeys(SPLITS, SplitSize()), None
    with ExitStack() as files:
        writers = {}
        for split in SPLITS:
            file = files.enter_context(pyarrow.OSFile(str(split_path(folder, split)), "wb"))
            writers[split] = files.enter_context(pyarrow.ipc.new_stream(file, schema))
        for buffer in buffers:
            for split, size in buffer_sizes(buffer).items():
                column = pyarrow.FixedSizeListArray.from_arrays(buffer.rows[split].ids.ravel(), recipe.row_length)
                writers[split].write_batch(pyarrow.record_batch([column], schema))
                sizes[split] += size
            if sizes[TRAIN].tokens >= enough:
                end = buffer.end
                break
    written = {split: FileRecord.of(split_path(folder, split)) for split in SPLITS}
    record = ShardRecord(recipe.fingerprint, begin, end, sizes, written)
    write_sealed_json(folder / RECORD, asdict(record))
    return record


def _interrupted(folder: Path, records: Sequence[ShardRecord], error: OSError) -> str:
    message = f"{folder} could not be written: {error}; free some space and run the same command again to continue"
    tokens = total_size(records)[TRAIN].tokens
    return f"{message}, or with --max_train_tokens {tokens} to keep what is there" if tokens else message
