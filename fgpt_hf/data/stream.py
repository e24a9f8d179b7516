"""Turn a stream of documents into packed rows: read several shards at once, tokenize on all cores, pack, shuffle.

Documents come in buffers of 8 blocks, from up to 8 shards at once; a block has at most 1,000 documents or 8 million
characters. A buffer of short blocks has more of them, because each buffer is packed on its own, and few documents fill
rows badly. No token is lost. The rows follow from the seed, not from the workers, the machine or the number of
processes, and reading can be resumed at any buffer. Shards are shuffled within an epoch and rows within a buffer;
documents of one shard that are far apart stay so. For a full shuffle prepare the rows first (`fgpt prepare`), at the
price of disk space, 2 bytes a token or 4.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from fgpt_hf.config.data_options import TextSource
from fgpt_hf.data.corpora import Shard, in_order
from fgpt_hf.data.packing import PackedRows, pack_documents
from fgpt_hf.data.positions import ShardPosition
from fgpt_hf.data.split_encoding import encode_splits, encode_with_kept_encoder, keep_encoder
from fgpt_hf.data.splits import (
    ALL_HELD_OUT,
    SPLITS,
    TRAIN,
    VALIDATION,
    ValidationRule,
    empty_split_error,
)
from fgpt_hf.retries import ONCE, READ_ERRORS, STREAM, Attempts, reading
from fgpt_hf.tokenizer.byte_bpe import Ids
from fgpt_hf.tokenizer.document_encoder import PROJECT_ENCODER, DocumentEncoder
from fgpt_hf.workers import BackgroundIterator, process_pool

SHARDS_AT_ONCE = 8  # each read by a thread of its own
BLOCKS_PER_BUFFER = 8  # at least, so that several shards are mixed
BUFFER_CHARACTERS = 2_000_000  # at least: some hundreds of rows, which pad less than 1 %
BLOCK_CHARACTERS = 8_000_000  # a block ends here, or after the documents that a shard gives at once
TEXTS_PER_TASK = 128  # fewer cost more in handing over than they gain in sharing out


class OpenShard(NamedTuple):
    """A shard that is being read: its number in the epoch's order, and the position up to which it was used."""

    number: int
    part: int = 0
    documents: int = 0


@dataclass(frozen=True)
class EpochPosition:
    """Where in an epoch a buffer begins.

    Attributes:
        buffer: the number of buffers before it.
        opened: the number of shards that were opened.
        shards: those that have not ended, in the order of their turns.
    """

    buffer: int = 0
    opened: int = 0
    shards: tuple[OpenShard, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return the position in values that JSON can hold, and a checkpoint that is read without running code.

        Example:
            >>> EpochPosition(buffer=1, opened=2, shards=(OpenShard(1, 0, 500),)).as_json()
            {'buffer': 1, 'opened': 2, 'shards': [[1, 0, 500]]}
        """
        return {**vars(self), "shards": list(map(list, self.shards))}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "EpochPosition":
        """Return the position that `as_json` gave."""
        shards = tuple(OpenShard(*shard) for shard in fields["shards"])
        return cls(fields["buffer"], fields["opened"], shards)


class Block(NamedTuple):
    """Documents of one shard, how often an epoch has each on average, and whether all of them are held out."""

    texts: Sequence[str]
    repeats: float
    is_validation: bool


class DocumentBuffer(NamedTuple):
    """Documents in blocks, and where in the epoch they begin and end."""

    blocks: Sequence[Block]
    begin: EpochPosition
    end: EpochPosition


class PackedBuffer(NamedTuple):
    """The rows of a buffer in random order and its number of documents, by split, and where it begins and ends."""

    rows: Mapping[str, PackedRows]
    documents: Mapping[str, int]
    begin: EpochPosition
    end: EpochPosition


class TokenizerPool:
    """Workers that turn documents into rows of `source.max_position_embeddings` tokens, held out by a rule.

    Without a rule, documents are held out whose hash is below `source.validation_fraction`. All documents of a shard
    that is for validation are held out, whatever the rule.

    Workers are threads: tokenizers work without Python's lock, and threads start at once. Hashing and handing over take
    the lock, so where there are many workers, or a training loop wants the lock, `in_processes` is faster.

    Example:
        >>> from contextlib import closing
        >>> from fgpt_hf.data.corpora import open_corpus
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp(), "poems.txt")
        >>> _ = path.write_text("Roses are red\\n\\nViolets are blue")
        >>> source = TextSource(dataset_name=str(path), max_position_embeddings=16)
        >>> with closing(TokenizerPool(source, workers=1)) as pool:
        ...     (buffer,) = pool.packed_buffers(open_corpus(source), EpochPosition())
        >>> buffer.rows["train"].ids.shape
        (1, 16)
    """

    def __init__(
        self,
        source: TextSource,
        workers: int,
        in_processes: bool = False,
        rule: ValidationRule | None = None,
        encoder: DocumentEncoder = PROJECT_ENCODER,
    ) -> None:
        self.row_length, self.validation_fraction = source.max_position_embeddings, source.validation_fraction
        self.holds_out = source.holds_out
        self.rule = ValidationRule(source.validation_fraction) if rule is None else rule
        self.workers, self.encoder = workers, encoder
        self.executor: Executor
        if in_processes:
            self.executor = process_pool(workers, partial(keep_encoder, encoder))
            self._encode: Callable[..., dict[str, list[Ids]]] = encode_with_kept_encoder
        else:
            self.executor = ThreadPoolExecutor(workers)
            self._encode = partial(encode_splits, encoder=encoder)

    def close(self) -> None:
        """End the workers without waiting for them."""
        self.executor.shutdown(wait=False, cancel_futures=True)

    def packed_buffers(
        self,
        shards: Sequence[Shard],
        start: EpochPosition,
        splits: Sequence[str] = SPLITS,
        seeds: Sequence[int] = (0, 0),
    ) -> Generator[PackedBuffer, None, None]:
        """Yield the buffers of an epoch from `start` on, with the rows of `splits` in an order that `seeds` decide.

        Raises:
            UserError: a shard cannot be read, even after waiting, or holds no text in that column.
        """
        submitted = self._submit(read_buffers(shards, start), splits)
        for buffer, tasks in BackgroundIterator(submitted, ahead=2 + self.workers // BLOCKS_PER_BUFFER):
            documents = {split: [ids for task in tasks for ids in task.result()[split]] for split in splits}
            rows = {
                split: _shuffled(
                    pack_documents(documents[split], self.row_length, self.encoder),
                    [*seeds, buffer.begin.buffer, SPLITS.index(split)],
                )
                for split in splits
            }
            counts = {split: len(documents[split]) for split in splits}
            yield PackedBuffer(rows, counts, buffer.begin, buffer.end)

    def _submit(
        self, buffers: Iterable[DocumentBuffer], splits: Sequence[str]
    ) -> Generator[tuple[DocumentBuffer, list["Future[dict[str, list[Ids]]]"]], None, None]:
        for buffer in buffers:
            tasks = [
                self.executor.submit(
                    self._encode,
                    block.texts[start : start + TEXTS_PER_TASK],
                    ALL_HELD_OUT if block.is_validation else self.rule,
                    splits,
                    block.repeats,
                )
                for block in buffer.blocks
                for start in range(0, len(block.texts), TEXTS_PER_TASK)
            ]
            yield buffer._replace(blocks=[]), tasks


def training_buffers(
    pool: TokenizerPool, shards: Sequence[Shard], seed: int, epoch: int, start: EpochPosition
) -> Iterator[tuple[int, PackedBuffer]]:
    """Yield the buffers to train on, each with its epoch, without end: every epoch has an order of its own.

    Raises:
        UserError: an epoch gives no rows, or a shard cannot be read.
    """
    while True:
        rows = 0
        ordered = shard_order(shards, seed, epoch)
        for buffer in pool.packed_buffers(ordered, start, (TRAIN,), (seed, epoch)):
            if len(buffer.rows[TRAIN].ids):
                rows += len(buffer.rows[TRAIN].ids)
                yield epoch, buffer
        if rows == 0 and start == EpochPosition():
            raise empty_split_error(pool.validation_fraction, TRAIN)
        epoch, start = epoch + 1, EpochPosition()


def validation_rows(pool: TokenizerPool, shards: Sequence[Shard], count: int) -> Ids:
    """Return the first `count` held-out rows of the shards in the order of their names, or all if there are fewer.

    Raises:
        UserError: no document is held out though some should be, or a shard cannot be read.
    """
    if not pool.holds_out:
        return np.empty((0, pool.row_length), dtype=pool.encoder.dtype)
    rows: list[Ids] = []
    for buffer in pool.packed_buffers(in_order(shards), EpochPosition(), (VALIDATION,)):
        rows.append(buffer.rows[VALIDATION].ids)
        if sum(map(len, rows)) >= count:
            break
    if not sum(map(len, rows)):
        raise empty_split_error(pool.validation_fraction, VALIDATION)
    return np.concatenate(rows)[:count]


def shard_order(shards: Sequence[Shard], seed: int, epoch: int) -> list[Shard]:
    """Return the shards in the random order of an epoch."""
    return [shards[index] for index in np.random.default_rng([seed, epoch]).permutation(len(shards))]


def read_buffers(shards: Sequence[Shard], start: EpochPosition) -> Iterator[DocumentBuffer]:
    """Yield the documents of an epoch from `start` on, taking turns between the open shards, a block from each.

    The next block of every open shard is read in the background. The order does not depend on which is read first.
    Shards for validation and others are not open at the same time, so the former give the same buffers as on their own.

    Raises:
        UserError: a shard cannot be read, even after waiting, or holds no text in that column.
    """
    turns = deque(_ShardReader(shards, shard) for shard in start.shards)
    position = start
    while True:
        blocks: list[Block] = []
        characters = 0
        opened = position.opened
        while len(blocks) < BLOCKS_PER_BUFFER or characters < BUFFER_CHARACTERS:
            while len(turns) < SHARDS_AT_ONCE and opened < len(shards):
                if turns and turns[0].is_validation != shards[opened].is_validation:
                    break
                turns.append(_ShardReader(shards, OpenShard(opened)))
                opened += 1
            if not turns:
                break
            reader = turns.popleft()
            if (block := next(reader, None)) is not None:
                blocks.append(block)
                characters += sum(map(len, block.texts))
                turns.append(reader)
        if not blocks:
            return
        begin, open_shards = position, tuple(reader.shard for reader in turns)
        position = EpochPosition(begin.buffer + 1, opened, open_shards)
        yield DocumentBuffer(blocks, begin, position)


class _ShardReader(Iterator[Block]):
    """The blocks of a shard, read one block ahead; `shard` says up to where they were taken."""

    def __init__(self, shards: Sequence[Shard], shard: OpenShard) -> None:
        opened = shards[shard.number]
        self.shard, self.repeats, self.is_validation = shard, opened.repeats, opened.is_validation
        self._texts = BackgroundIterator(_read_texts(opened, ShardPosition(shard.part, shard.documents)), ahead=1)

    def __next__(self) -> Block:
        texts, position = next(self._texts)
        self.shard = OpenShard(self.shard.number, *position)
        return Block(texts, self.repeats, self.is_validation)


_Texts: TypeAlias = tuple[list[str], ShardPosition]  # of one block, and the position after it


def _read_texts(shard: Shard, position: ShardPosition) -> Generator[_Texts, None, None]:
    """Yield a shard's texts from a position on, without empty ones; resume where the reading failed."""
    attempts = Attempts(shard.name, STREAM if "://" in shard.name else ONCE)
    with reading(shard.name):
        while True:
            try:
                for texts, (part, stop) in shard.read(position):
                    first = stop - len(texts)
                    for begin, end in _spans(texts):
                        position = ShardPosition(part, first + end)
                        yield [text for text in texts[begin:end] if text], position
                    attempts.succeeded()
                return
            except READ_ERRORS as error:
                attempts.failed(error)


def _spans(texts: Sequence[str | None]) -> Iterator[tuple[int, int]]:
    """Yield start and stop of parts of `BLOCK_CHARACTERS` each, and less than one text more."""
    start = characters = 0
    for stop, text in enumerate(texts, start=1):
        characters += len(text or "")
        if characters >= BLOCK_CHARACTERS or stop == len(texts):
            yield start, stop
            start, characters = stop, 0


def _shuffled(rows: PackedRows, seeds: Sequence[int]) -> PackedRows:
    return rows._replace(ids=rows.ids[np.random.default_rng(seeds).permutation(len(rows.ids))])
