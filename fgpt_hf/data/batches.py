"""From rows of token ids to the tensors of a step: rows in an order, an order with a position.

Rows are numbered along the whole run. A call of `take(n)` on all of P processes draws the next n·P numbers, n for each
in order of rank: so the rows of a step are the same however they are divided into micro-batches and processes.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fgpt_hf.data.packing import Ids
from fgpt_hf.errors import UserError
from fgpt_hf.tokenizer.tokenizer import END_OF_TEXT_ID, PAD_ID

IGNORED = -100  # the label of a token that is not scored, as in torch and transformers


class Batches(Protocol):
    """All that the training loop knows of data: this process's next rows, and where in the data it stands."""

    def take(self, count: int) -> dict[str, Tensor]:
        """The next `count` rows of this process: tensors `(count, T)` by name."""

    def state_dict(self) -> dict[str, Any]:
        """The position, the same on every process."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position, on any number of processes."""


class Rows(Protocol):
    """Rows in memory or on a disk."""

    def __len__(self) -> int: ...

    def __getitem__(self, numbers: Sequence[int]) -> Any:
        """The rows of these numbers: ids, `(len(numbers), T)`, or whatever `collate` is to make a batch of."""


class ShuffledRows:
    """Rows in a new random order each epoch, of which every process takes its own part, as `collate` makes it."""

    def __init__(
        self,
        rows: Rows,
        seed: int,
        rank: int = 0,
        processes: int = 1,
        collate: Callable[[Any], dict[str, Tensor]] | None = None,
    ) -> None:
        if not len(rows):
            raise UserError("the corpus gives no training rows: it holds no documents outside the held-out share")
        self.rows, self.seed, self.rank, self.processes = rows, seed, rank, processes
        self.collate = collate or as_batch
        self.position = 0
        self._order = lru_cache(maxsize=2)(self._order_of_epoch)

    def take(self, count: int) -> dict[str, Tensor]:
        first = self.position + self.rank * count
        self.position += count * self.processes
        return self.collate(self.rows[[self._row(number) for number in range(first, first + count)]])

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "rows": len(self.rows)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["rows"] != len(self.rows):
            raise UserError(
                f"the corpus has {len(self.rows)} rows and had {state['rows']} when the checkpoint was written: its "
                "documents have changed, so the run cannot go on exactly"
            )
        self.position = state["position"]

    def _row(self, number: int) -> int:
        epoch, place = divmod(number, len(self.rows))
        return int(self._order(epoch)[place])

    def _order_of_epoch(self, epoch: int) -> npt.NDArray[np.int64]:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))


class RowChunk(NamedTuple):
    """Some rows in the order in which they are to be taken, and the place that leads to them again."""

    rows: Ids
    place: dict[str, Any]


class StreamedRows:
    """Rows that come in stretches, of which every process takes its own part.

    Every process makes all of the rows: how many a stretch holds is known only when it is made, and the number of a row
    must not depend on who makes it. A worker makes over a million tokens a second, which several GPUs do not use up;
    where it matters, prepared rows cost nothing.
    """

    def __init__(
        self,
        stretches_from: Callable[[dict[str, Any]], Iterator[RowChunk]],
        place: dict[str, Any],
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        self.stretches_from, self.rank, self.processes = stretches_from, rank, processes
        self._stretch, self._row = _nothing_at(place), 0
        self._stretches = stretches_from(place)

    def take(self, count: int) -> dict[str, Tensor]:
        missing = count * self.processes
        taken: list[Ids] = []
        while missing:
            while self._row >= len(self._stretch.rows):
                self._row -= len(self._stretch.rows)
                self._stretch = next(self._stretches)
            taken.append(self._stretch.rows[self._row : self._row + missing])
            self._row += len(taken[-1])
            missing -= len(taken[-1])
        return as_batch(np.concatenate(taken)[self.rank * count : (self.rank + 1) * count])

    def state_dict(self) -> dict[str, Any]:
        return {"place": self._stretch.place, "row": self._row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._stretch, self._row = _nothing_at(state["place"]), state["row"]
        self._stretches = self.stretches_from(state["place"])


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


def _nothing_at(place: dict[str, Any]) -> RowChunk:
    """The empty stretch before the one that a place leads to."""
    return RowChunk(np.empty((0, 0), dtype=np.uint16), place)
