"""Turn rows into the batches of a step: rows in an order, and a position in that order that can be saved.

Rows are numbered along the whole run. A call of `take(n)` on all of P processes draws the next n·P numbers, n for each
in order of rank: so the rows of a step are the same however they are divided into micro-batches and processes.
`ShuffledRows` needs all rows at hand, on a disk or in memory, and shuffles them again for each epoch. `StreamedRows`
takes rows as they come, and each process makes all of them to use its share.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fgpt_hf.data.batch_fields import DOCUMENT_ENDS, IGNORED, document_ends
from fgpt_hf.data.stream import EpochPosition
from fgpt_hf.errors import UserError
from fgpt_hf.tokenizer.byte_bpe import Ids
from fgpt_hf.tokenizer.document_encoder import PROJECT_ENCODER, DocumentEncoder


class Batches(Protocol):
    """The training loop's view of data: this process's next rows, and the position in the data."""

    def take(self, count: int) -> dict[str, Tensor]:
        """Return the next `count` rows of this process: tensors `(count, T)` by name."""

    def state_dict(self) -> dict[str, Any]:
        """Return the position, the same on every process, in values that JSON can hold."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position, on any number of processes.

        Raises:
            UserError: the data has changed since, or another version of this package wrote the position.
        """


SomeRows = TypeVar("SomeRows", covariant=True)


class Rows(Protocol[SomeRows]):
    """Rows in memory or on a disk."""

    def __len__(self) -> int: ...

    def __getitem__(self, indices: Sequence[int], /) -> SomeRows:
        """Return the rows at these indices: ids, `(len(indices), T)`, or what `collate` makes a batch of."""


class TrainingRows(Rows[SomeRows], Protocol[SomeRows]):
    """Rows that a resumed run recognizes."""

    @property
    def fingerprint(self) -> str:
        """Text that differs wherever the rows, or their order, do."""


class RowsInMemory:
    """Token ids, `(N, T)`, as rows."""

    def __init__(self, ids: Ids) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, indices: Sequence[int]) -> Ids:
        return self.ids[indices]

    @property
    def fingerprint(self) -> str:
        """A hash of the ids."""
        return arrays_fingerprint(self.ids)


def arrays_fingerprint(*arrays: npt.NDArray[Any]) -> str:
    """Return a hash of the shapes, types and values of arrays.

    Example:
        >>> arrays_fingerprint(np.zeros(2)) == arrays_fingerprint(np.zeros(3))
        False
    """
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.shape} {array.dtype.str} ".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


class ShuffledRows(Generic[SomeRows]):
    """Rows in a new random order each epoch, of which every process takes its own share.

    Example:
        >>> batches = ShuffledRows(RowsInMemory(np.arange(8, dtype=np.uint16).reshape(4, 2)), seed=0)
        >>> batches.take(3)["input_ids"].shape
        torch.Size([3, 2])
        >>> batches.state_dict()  # doctest: +ELLIPSIS
        {'position': 3, 'rows': '...'}
    """

    def __init__(
        self,
        rows: TrainingRows[SomeRows],
        seed: int,
        rank: int = 0,
        processes: int = 1,
        collate: Callable[[SomeRows], dict[str, Tensor]] | None = None,
    ) -> None:
        if not len(rows):
            raise UserError("there are no training rows: the corpus holds no documents outside the validation fraction")
        self.rows, self.seed, self.rank, self.processes = rows, seed, rank, processes
        self.collate: Callable[[Any], dict[str, Tensor]] = collate or as_batch
        self.position = 0
        self._order = lru_cache(maxsize=2)(self._order_of_epoch)

    def take(self, count: int) -> dict[str, Tensor]:
        first = self.position + self.rank * count
        self.position += count * self.processes
        return self.collate(self.rows[[self._row_index(number) for number in range(first, first + count)]])

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "rows": self._fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with reading_position():
            position, rows = int(state["position"]), state["rows"]
        if rows != self._fingerprint:
            raise UserError(
                "the training rows are not those of the checkpoint: the dataset's documents, or how they are made "
                "into rows, have changed, so the run cannot be resumed exactly: restore the data, or start a new run"
            )
        self.position = position

    @cached_property
    def _fingerprint(self) -> str:
        return self.rows.fingerprint

    def _row_index(self, number: int) -> int:
        epoch, offset = divmod(number, len(self.rows))
        return int(self._order(epoch)[offset])

    def _order_of_epoch(self, epoch: int) -> npt.NDArray[np.int64]:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))


@dataclass(frozen=True)
class StreamPosition:
    """A position in a stream of epochs: which version of the corpus it is in, the epoch, and where in that."""

    corpus: str
    epoch: int = 0
    start: EpochPosition = EpochPosition()

    def as_json(self) -> dict[str, Any]:
        """Return the position in values that JSON can hold."""
        return {**vars(self), "start": self.start.as_json()}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "StreamPosition":
        """Return the position that `as_json` gave."""
        return cls(fields["corpus"], fields["epoch"], EpochPosition.from_json(fields["start"]))


class RowChunk(NamedTuple):
    """Some rows, `(N, T)`, in the order in which they are taken, and the position where they begin."""

    rows: Ids
    position: StreamPosition


class StreamedRows:
    """Rows that come in chunks, of which every process takes its own share.

    Every process makes all of the rows: the size of a chunk is known only when it is made, and the number of a row must
    not depend on who makes it. A tokenizing process makes over a million tokens a second, which several GPUs do not use
    up; where it does limit the speed, prepare the rows first.

    Args:
        chunks_from: returns the chunks from a position on, without end.
        start: the first position.
        collate: makes rows a batch.
    """

    def __init__(
        self,
        chunks_from: Callable[[StreamPosition], Iterator[RowChunk]],
        start: StreamPosition,
        rank: int = 0,
        processes: int = 1,
        collate: Callable[[Ids], dict[str, Tensor]] | None = None,
    ) -> None:
        self.chunks_from, self.rank, self.processes = chunks_from, rank, processes
        self.collate = collate or as_batch
        self._chunk, self._row, self._chunks = _before(start), 0, chunks_from(start)

    def take(self, count: int) -> dict[str, Tensor]:
        missing = count * self.processes
        taken: list[Ids] = []
        while missing:
            while self._row >= len(self._chunk.rows):
                self._row -= len(self._chunk.rows)
                self._chunk = next(self._chunks)
            taken.append(self._chunk.rows[self._row : self._row + missing])
            self._row += len(taken[-1])
            missing -= len(taken[-1])
        return self.collate(np.concatenate(taken)[self.rank * count : (self.rank + 1) * count])

    def state_dict(self) -> dict[str, Any]:
        return {"position": self._chunk.position.as_json(), "row": self._row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with reading_position():
            position, row = StreamPosition.from_json(state["position"]), int(state["row"])
        self._chunk, self._row, self._chunks = _before(position), row, self.chunks_from(position)


@contextmanager
def reading_position() -> Iterator[None]:
    """Convert what a position of another form raises to a UserError."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(
            "the checkpoint's position in the data is of another kind of data, or of another version of fgpt_hf: "
            "resume with the version that wrote it, or start a new run"
        ) from error


def _before(position: StreamPosition) -> RowChunk:
    """Return an empty chunk in front of the one at a position."""
    return RowChunk(np.empty((0, 0), dtype=np.uint16), position)


def as_batch(ids: Ids, encoder: DocumentEncoder = PROJECT_ENCODER) -> dict[str, Tensor]:
    """Return rows of documents, `(B, T)`, as `input_ids` and `labels`; if packed, with `position_ids` and their ends.

    Positions restart with each document, and padding has no label. All padding of a row ends together, as one document.

    Args:
        encoder: what made the rows.

    Example:
        >>> batch = as_batch(np.array([[50256, 5, 6, 50256, 7, 50261]], dtype=np.uint16))
        >>> batch["position_ids"].tolist(), batch["labels"].tolist()
        ([[0, 1, 2, 0, 1, 0]], [[50256, 5, 6, 50256, 7, -100]])
    """
    input_ids = torch.from_numpy(ids.astype(np.int64))
    is_padding = at_row_end(input_ids == encoder.pad)
    batch = {"input_ids": input_ids, "labels": input_ids.masked_fill(is_padding, IGNORED)}
    if encoder.packs:
        offsets = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        starts = torch.where((input_ids == encoder.start) | is_padding, offsets, 0)
        position_ids = offsets - starts.cummax(dim=1).values
        batch |= {"position_ids": position_ids, DOCUMENT_ENDS: document_ends(position_ids, is_padding)}
    return batch


def at_row_end(is_some: Tensor) -> Tensor:
    """Return which tokens belong to the unbroken run, at the end of their row, of those that are `is_some`, `(B, T)`.

    Example:
        >>> at_row_end(torch.tensor([[True, False, True, True]]))
        tensor([[False, False,  True,  True]])
    """
    return is_some.flip(1).long().cumprod(dim=1).flip(1).bool()
