"""Windows of documents become rows of tokens, in processes beside the one that asks for them."""

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypedDict

import numpy as np

from fgpt_hf.config.runs import TextSource
from fgpt_hf.data.corpora import Shard, ShardPosition, in_order, is_validation
from fgpt_hf.data.packing import Ids, PackedRows, pack_documents
from fgpt_hf.errors import UserError
from fgpt_hf.retries import ONCE, READ_ERRORS, STREAM, Attempts, reading
from fgpt_hf.tokenizer.fast_encoding import encode_documents
from fgpt_hf.workers import InBackground, process_pool

SHARDS_AT_ONCE = 8  # shards that are read at once, each by a thread of its own
BLOCKS = 8  # that make a window
BLOCK_CHARACTERS = 8_000_000  # a block ends here, or after the documents that a shard gives at once


class Position(TypedDict):
    """Where in an epoch a window begins.

    `opened` counts the shards that were begun. `lanes` holds, for those not ended and in the order of their turns,
    which shard of the epoch it is, the part of it, and the documents of that part that come before.
    """

    window: int
    opened: int
    lanes: list[list[int]]


class DocumentBuffer(NamedTuple):
    """Documents in blocks, and where in the epoch they begin and end."""

    blocks: list[list[str]]
    begin: Position
    end: Position


def epoch_start() -> Position:
    return Position(window=0, opened=0, lanes=[])


def shard_order(shards: Sequence[Shard], seed: int, epoch: int) -> list[Shard]:
    """The shards in the random order of an epoch."""
    return [shards[index] for index in np.random.default_rng([seed, epoch]).permutation(len(shards))]


def read_buffers(shards: Sequence[Shard], start: Position) -> Iterator[DocumentBuffer]:
    """The windows of an epoch from `start` to the end, with the next blocks being read meanwhile.

    Raises:
        UserError: a shard cannot be read, even after waiting, or holds no text in that column.
    """
    threads = ThreadPoolExecutor(SHARDS_AT_ONCE, thread_name_prefix="shard")
    try:
        turns = deque(_ShardReader(threads, shards, place, (part, skip)) for place, part, skip in start["lanes"])
        position, opened = start, start["opened"]
        while True:
            blocks: list[list[str]] = []
            while len(blocks) < BLOCKS:
                while len(turns) < SHARDS_AT_ONCE and opened < len(shards):
                    turns.append(_ShardReader(threads, shards, opened, (0, 0)))
                    opened += 1
                if not turns:
                    break
                lane = turns.popleft()
                if (block := lane.next_block()) is not None:
                    blocks.append(block)
                    turns.append(lane)
            if not blocks:
                return
            begin, lanes = position, [[lane.place, *lane.mark] for lane in turns]
            position = Position(window=begin["window"] + 1, opened=opened, lanes=lanes)
            yield DocumentBuffer(blocks, begin, position)
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


class _ShardReader:
    """A shard that is being read, one block ahead."""

    def __init__(self, threads: ThreadPoolExecutor, shards: Sequence[Shard], place: int, mark: ShardPosition) -> None:
        self.threads, self.place, self.mark = threads, place, mark
        self._blocks = _read_blocks(shards[place], mark)
        self._ahead = self._read_ahead()

    def next_block(self) -> list[str] | None:
        """The next texts, or None if the shard has ended; `mark` is then the place after them."""
        block = self._ahead.result()
        if block is None:
            return None
        texts, self.mark = block
        self._ahead = self._read_ahead()
        return texts

    def _read_ahead(self) -> Future[Any]:
        return self.threads.submit(next, self._blocks, None)


def _read_blocks(shard: Shard, mark: ShardPosition) -> Iterator[tuple[list[str], ShardPosition]]:
    """A shard's texts from a place on, without empty ones; after a failure it is opened again where it broke off."""
    attempts = Attempts(shard.name, STREAM if "://" in shard.name else ONCE)
    with reading(shard.name):
        while True:
            try:
                for texts, (part, place) in shard.read(mark):
                    for start, stop in _spans(texts):
                        mark = (part, place - len(texts) + stop)
                        yield [text for text in texts[start:stop] if text], mark
                    attempts.succeeded()
                return
            except READ_ERRORS as error:
                attempts.failed(error)


def _spans(texts: Sequence[str | None]) -> Iterator[tuple[int, int]]:
    """Start and stop of parts with `BLOCK_CHARACTERS` each, and less than one text more."""
    start = characters = 0
    for stop, text in enumerate(texts, start=1):
        characters += len(text or "")
        if characters >= BLOCK_CHARACTERS or stop == len(texts):
            yield start, stop
            start, characters = stop, 0


TEXTS_PER_TASK = 128  # fewer cost more in handing over than they gain in sharing out
TRAIN, VALIDATION = SPLITS = ("train", "validation")  # as they are called on the Hub


class PackedBuffer(NamedTuple):
    """The rows of a window by split, in random order, the lengths of its documents, and where it begins and ends."""

    rows: dict[str, PackedRows]
    lengths: dict[str, list[int]]
    begin: Position
    end: Position


class TokenizerPool:
    """How documents become rows: which of them are held out, how long a row is, and who does it.

    Workers are threads: tiktoken works outside Python's lock, and threads start at once. Hashing and handing over take
    the lock, so where there are many workers, or the lock is wanted by a training loop, they are processes.
    """

    def __init__(self, source: TextSource, workers: int, in_processes: bool = False) -> None:
        self.row_length, self.validation_fraction = source.max_position_embeddings, source.validation_fraction
        self.workers = workers
        self.pool: Executor = process_pool(workers) if in_processes else ThreadPoolExecutor(workers)

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)

    def windows(
        self, shards: Sequence[Shard], start: Position, splits: Sequence[str] = SPLITS, seeds: Sequence[int] = (0, 0)
    ) -> Generator[PackedBuffer, None, None]:
        """The windows of an epoch from `start` on; the order of their rows follows from `seeds`."""
        submitted = self._submitted(read_buffers(shards, start), splits)
        for window, tasks in InBackground(submitted, ahead=1 + self.workers // BLOCKS):
            documents = {split: [ids for task in tasks for ids in task.result()[split]] for split in splits}
            rows = {
                split: _shuffled_rows(
                    pack_documents(documents[split], self.row_length),
                    [*seeds, window.begin["window"], SPLITS.index(split)],
                )
                for split in splits
            }
            lengths = {split: [len(ids) for ids in documents[split]] for split in splits}
            yield PackedBuffer(rows, lengths, window.begin, window.end)

    def _submitted(
        self, windows: Iterable[DocumentBuffer], splits: Sequence[str]
    ) -> Generator[tuple[DocumentBuffer, list[Future[dict[str, list[Ids]]]]], None, None]:
        for window in windows:
            tasks = [
                self.pool.submit(encode_texts, block[start : start + TEXTS_PER_TASK], self.validation_fraction, splits)
                for block in window.blocks
                for start in range(0, len(block), TEXTS_PER_TASK)
            ]
            yield window._replace(blocks=[]), tasks


def encode_texts(texts: Sequence[str], validation_fraction: float, splits: Sequence[str]) -> dict[str, list[Ids]]:
    """The ids of the documents that belong to each of `splits`."""
    chosen: dict[str, list[str]] = {split: [] for split in splits}
    for text in texts:
        split = VALIDATION if is_validation(text, validation_fraction) else TRAIN
        if split in chosen:
            chosen[split].append(text)
    return {split: encode_documents(members, threads=1) for split, members in chosen.items()}


def training_buffers(
    tokenising: TokenizerPool, shards: Sequence[Shard], seed: int, epoch: int, start: Position
) -> Iterator[tuple[int, PackedBuffer]]:
    """Each window of rows to train on, with its epoch, without end: every epoch has an order of its own.

    Raises:
        UserError: an epoch gives no rows.
    """
    while True:
        rows = 0
        ordered = shard_order(shards, seed, epoch)
        for window in tokenising.windows(ordered, start, (TRAIN,), (seed, epoch)):
            if len(window.rows[TRAIN].ids):
                rows += len(window.rows[TRAIN].ids)
                yield epoch, window
        if rows == 0 and start == epoch_start():
            raise no_rows(tokenising.validation_fraction, TRAIN)
        epoch, start = epoch + 1, epoch_start()


def validation_rows(tokenising: TokenizerPool, shards: Sequence[Shard], count: int) -> Ids:
    """The first `count` held-out rows of the shards in the order of their names, or all of them if there are fewer.

    Raises:
        UserError: there is none.
    """
    rows: list[Ids] = []
    for window in tokenising.windows(in_order(shards), epoch_start(), (VALIDATION,)):
        rows.append(window.rows[VALIDATION].ids)
        if sum(map(len, rows)) >= count:
            break
    if not sum(map(len, rows)):
        raise no_rows(tokenising.validation_fraction, VALIDATION)
    return np.concatenate(rows)[:count]


def no_rows(validation_fraction: float, split: str) -> UserError:
    """The error to raise when a split is empty."""
    purpose = "train on" if split == TRAIN else "hold out"
    return UserError(
        f"no document to {purpose}: validation_fraction={validation_fraction} leaves none, so choose another share, or "
        "the corpus holds no text"
    )


def _shuffled_rows(rows: PackedRows, seeds: Sequence[int]) -> PackedRows:
    return rows._replace(ids=rows.ids[np.random.default_rng(seeds).permutation(len(rows.ids))])
