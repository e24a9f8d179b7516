"""From token ids to the tensors of a step: documents packed into rows, rows in an order, an order with a position.

Every document in a row begins with `<|endoftext|>`: the row alone says where attention must stop, and the last token
of a document learns that the document ends. What no document fills is `<|pad|>`.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fgpt_hf.tokenizer import END_OF_TEXT_ID, PAD_ID

IGNORED = -100  # the label of a token that is not scored, as in torch and transformers

Ids = npt.NDArray[np.uint16]


class Batches(Protocol):
    """All that the training loop knows of data: this process's next rows, and where in the data it stands."""

    def take(self, count: int) -> dict[str, Tensor]:
        """The next `count` rows of this process: tensors `(count, T)` by name."""

    def state_dict(self) -> dict[str, int]:
        """The position, the same on every process."""

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a position, on any number of processes."""


class PackedRows(NamedTuple):
    """`ids`, `(rows, row_length)`, and what packing made of the documents' tokens."""

    ids: Ids
    tokens: int
    padding: int

    def __str__(self) -> str:
        rows, length = self.ids.shape
        share = self.padding / max(1, self.ids.size)
        return f"{self.tokens:,} tokens in {rows:,} rows of {length}: none lost, {share:.2%} padding"


def pack_documents(documents: Iterable[Ids], row_length: int) -> PackedRows:
    """Pack documents into rows, each document behind an `<|endoftext|>`, losing no token.

    A document longer than a row is cut into pieces, which are packed like documents of their own.
    """
    pieces = [piece for document in documents for piece in _pieces(document, row_length - 1)]
    plan = best_fit_decreasing([len(piece) + 1 for piece in pieces], row_length)
    ids = np.full((len(plan), row_length), PAD_ID, dtype=np.uint16)
    for row, members in zip(ids, plan, strict=True):
        start = 0
        for piece in (pieces[member] for member in members):
            row[start] = END_OF_TEXT_ID
            row[start + 1 : start + 1 + len(piece)] = piece
            start += 1 + len(piece)
    tokens = sum(len(piece) for piece in pieces)
    return PackedRows(ids, tokens, ids.size - tokens - len(pieces))


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Assign items to rows of `capacity`: longest first, each to the fullest row that still has room for it.

    At most 11/9 of the fewest possible rows (Johnson 1973). Returns the item numbers of each row.
    """
    rows: list[list[int]] = []
    rows_with_room: dict[int, list[int]] = defaultdict(list)
    rooms = 0  # a bit for every room that some row has, so that the least room that suffices is the lowest bit
    for item in np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable").tolist():
        length = lengths[item]
        if not 0 < length <= capacity:
            raise ValueError(f"an item of length {length} does not fit a row of {capacity}")
        sufficient = rooms >> length
        if sufficient:
            room = length + (sufficient & -sufficient).bit_length() - 1
            row = rows_with_room[room].pop()
            if not rows_with_room[room]:
                rooms ^= 1 << room
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(item)
        rows_with_room[room - length].append(row)
        rooms |= 1 << (room - length)
    return rows


class RandomRows:
    """Packed rows in a new random order each epoch, of which every process takes its own part.

    Rows are numbered along the whole run. A call of `take(n)` on all of P processes draws the next n·P numbers, n for
    each in order of rank: so the rows of a step are the same however they are divided into micro-batches and processes.
    """

    def __init__(self, rows: Ids, seed: int, rank: int = 0, processes: int = 1) -> None:
        if not len(rows):
            raise ValueError("the corpus gives no training rows: it holds no documents outside the held-out share")
        self.rows, self.seed, self.rank, self.processes = rows, seed, rank, processes
        self.position = 0
        self._order = lru_cache(maxsize=2)(self._order_of_epoch)

    def take(self, count: int) -> dict[str, Tensor]:
        first = self.position + self.rank * count
        self.position += count * self.processes
        return as_batch(np.stack([self.rows[self._row(number)] for number in range(first, first + count)]))

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]

    def _row(self, number: int) -> int:
        epoch, place = divmod(number, len(self.rows))
        return int(self._order(epoch)[place])

    def _order_of_epoch(self, epoch: int) -> npt.NDArray[np.int64]:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))


def as_batch(ids: Ids) -> dict[str, Tensor]:
    """Rows, `(B, T)`, as `input_ids`, `position_ids` that restart with each document, and `labels` without padding."""
    input_ids = torch.from_numpy(ids.astype(np.int64))
    starts = (input_ids == END_OF_TEXT_ID) | (input_ids == PAD_ID)
    places = torch.arange(input_ids.shape[1]).expand_as(input_ids)
    start_of_document = torch.where(starts, places, 0).cummax(dim=1).values
    return {
        "input_ids": input_ids,
        "position_ids": places - start_of_document,
        "labels": input_ids.masked_fill(input_ids == PAD_ID, IGNORED),
    }


def _pieces(document: Ids, length: int) -> Iterator[Ids]:
    return (document[start : start + length] for start in range(0, len(document), length))
