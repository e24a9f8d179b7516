"""Windows of documents become rows of tokens, in processes beside the one that asks for them."""

from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from fgpt_hf.corpora import Shard, in_order, is_held_out
from fgpt_hf.packing import Ids, PackedRows, pack_documents
from fgpt_hf.runs import TextSource
from fgpt_hf.tokenizer import encode_documents
from fgpt_hf.windows import BLOCKS, Position, Window, epoch_start, read_windows, shard_order
from fgpt_hf.workers import InBackground, process_pool

TEXTS_PER_TASK = 128  # fewer cost more in handing over than they gain in sharing out
TRAIN, HELD_OUT = SPLITS = ("train", "validation")  # as they are called on the Hub


class PackedWindow(NamedTuple):
    """The rows of a window by split, in random order, the lengths of its documents, and where it begins and ends."""

    rows: dict[str, PackedRows]
    lengths: dict[str, list[int]]
    begin: Position
    end: Position


class Tokenising:
    """How documents become rows: which of them are held out, how long a row is, and who does it.

    Workers are threads: tiktoken works outside Python's lock, and threads start at once. Hashing and handing over take
    the lock, so where there are many workers, or the lock is wanted by a training loop, they are processes.
    """

    def __init__(self, source: TextSource, workers: int, in_processes: bool = False) -> None:
        self.row_length, self.held_out_share = source.max_position_embeddings, source.held_out_share
        self.workers = workers
        self.pool: Executor = process_pool(workers) if in_processes else ThreadPoolExecutor(workers)

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)

    def windows(
        self, shards: Sequence[Shard], start: Position, splits: Sequence[str] = SPLITS, seeds: Sequence[int] = (0, 0)
    ) -> Generator[PackedWindow, None, None]:
        """The windows of an epoch from `start` on; the order of their rows follows from `seeds`."""
        submitted = self._submitted(read_windows(shards, start), splits)
        for window, tasks in InBackground(submitted, ahead=1 + self.workers // BLOCKS):
            documents = {split: [ids for task in tasks for ids in task.result()[split]] for split in splits}
            rows = {
                split: _shuffled(
                    pack_documents(documents[split], self.row_length),
                    [*seeds, window.begin["window"], SPLITS.index(split)],
                )
                for split in splits
            }
            lengths = {split: [len(ids) for ids in documents[split]] for split in splits}
            yield PackedWindow(rows, lengths, window.begin, window.end)

    def _submitted(
        self, windows: Iterable[Window], splits: Sequence[str]
    ) -> Generator[tuple[Window, list[Future[dict[str, list[Ids]]]]], None, None]:
        for window in windows:
            tasks = [
                self.pool.submit(encode_texts, block[start : start + TEXTS_PER_TASK], self.held_out_share, splits)
                for block in window.blocks
                for start in range(0, len(block), TEXTS_PER_TASK)
            ]
            yield window._replace(blocks=[]), tasks


def encode_texts(texts: Sequence[str], held_out_share: float, splits: Sequence[str]) -> dict[str, list[Ids]]:
    """The ids of the documents that belong to each of `splits`."""
    chosen: dict[str, list[str]] = {split: [] for split in splits}
    for text in texts:
        split = HELD_OUT if is_held_out(text, held_out_share) else TRAIN
        if split in chosen:
            chosen[split].append(text)
    return {split: encode_documents(members, threads=1) for split, members in chosen.items()}


def training_windows(
    tokenising: Tokenising, shards: Sequence[Shard], seed: int, epoch: int, start: Position
) -> Iterator[tuple[int, PackedWindow]]:
    """Each window of rows to train on, with its epoch, without end: every epoch has an order of its own.

    Raises:
        ValueError: an epoch gives no rows.
    """
    while True:
        rows = 0
        ordered = shard_order(shards, seed, epoch)
        for window in tokenising.windows(ordered, start, (TRAIN,), (seed, epoch)):
            if len(window.rows[TRAIN].ids):
                rows += len(window.rows[TRAIN].ids)
                yield epoch, window
        if rows == 0 and start == epoch_start():
            raise no_rows(tokenising.held_out_share, TRAIN)
        epoch, start = epoch + 1, epoch_start()


def held_out_rows(tokenising: Tokenising, shards: Sequence[Shard], count: int) -> Ids:
    """The first `count` held-out rows of the shards in the order of their names, or all of them if there are fewer.

    Raises:
        ValueError: there is none.
    """
    rows: list[Ids] = []
    for window in tokenising.windows(in_order(shards), epoch_start(), (HELD_OUT,)):
        rows.append(window.rows[HELD_OUT].ids)
        if sum(map(len, rows)) >= count:
            break
    if not sum(map(len, rows)):
        raise no_rows(tokenising.held_out_share, HELD_OUT)
    return np.concatenate(rows)[:count]


def no_rows(held_out_share: float, split: str) -> ValueError:
    """The error to raise when a split is empty."""
    purpose = "train on" if split == TRAIN else "hold out"
    return ValueError(
        f"no document to {purpose}: held_out_share={held_out_share} leaves none, so choose another share, or the "
        "corpus holds no text"
    )


def _shuffled(rows: PackedRows, seeds: Sequence[int]) -> PackedRows:
    return rows._replace(ids=rows.ids[np.random.default_rng(seeds).permutation(len(rows.ids))])
