"""Documents in windows: a few thousand at a time, from several shards at once, in an order that can be continued.

A window's documents come from up to eight shards in turn. Which documents a window holds follows from the order of the
shards alone, not from which of them answers first, and where a window begins is a few numbers.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypedDict

import numpy as np
import pyarrow
from huggingface_hub.errors import HTTPError

from fgpt_hf.corpora import Mark, Shard
from fgpt_hf.retries import MOST_FAILURES, Patience

LANES = 8  # shards that are read at once, each by a thread of its own
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


class Window(NamedTuple):
    """Documents in blocks, and where in the epoch they begin and end."""

    blocks: list[list[str]]
    begin: Position
    end: Position


def epoch_start() -> Position:
    return Position(window=0, opened=0, lanes=[])


def shard_order(shards: Sequence[Shard], seed: int, epoch: int) -> list[Shard]:
    """The shards in the random order of an epoch."""
    return [shards[index] for index in np.random.default_rng([seed, epoch]).permutation(len(shards))]


def read_windows(shards: Sequence[Shard], start: Position) -> Iterator[Window]:
    """The windows of an epoch from `start` to the end, with the next blocks being read meanwhile.

    Raises:
        ValueError: a shard cannot be read, even after waiting, or holds no text in that column.
    """
    threads = ThreadPoolExecutor(LANES, thread_name_prefix="shard")
    try:
        turns = deque(_Lane(threads, shards, place, (part, skip)) for place, part, skip in start["lanes"])
        position, opened = start, start["opened"]
        while True:
            blocks: list[list[str]] = []
            while len(blocks) < BLOCKS:
                while len(turns) < LANES and opened < len(shards):
                    turns.append(_Lane(threads, shards, opened, (0, 0)))
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
            yield Window(blocks, begin, position)
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


class _Lane:
    """A shard that is being read, one block ahead."""

    def __init__(self, threads: ThreadPoolExecutor, shards: Sequence[Shard], place: int, mark: Mark) -> None:
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


def _read_blocks(shard: Shard, mark: Mark) -> Iterator[tuple[list[str], Mark]]:
    """A shard's texts from a place on, without empty ones; after a failure it is opened again where it broke off."""
    patience = Patience(shard.name, MOST_FAILURES if "://" in shard.name else 1)
    while True:
        try:
            for texts, (part, place) in shard.read(mark):
                for start, stop in _spans(texts):
                    mark = (part, place - len(texts) + stop)
                    yield [text for text in texts[start:stop] if text], mark
                patience.succeeded()
            return
        except (OSError, HTTPError, pyarrow.ArrowInvalid) as error:
            patience.wait(error)


def _spans(texts: Sequence[str | None]) -> Iterator[tuple[int, int]]:
    """Start and stop of parts with `BLOCK_CHARACTERS` each, and less than one text more."""
    start = characters = 0
    for stop, text in enumerate(texts, start=1):
        characters += len(text or "")
        if characters >= BLOCK_CHARACTERS or stop == len(texts):
            yield start, stop
            start, characters = stop, 0
