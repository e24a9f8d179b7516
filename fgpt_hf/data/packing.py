"""Documents into rows: which document goes where, and what each way of doing it keeps, loses and pads.

Every document in a row begins with `<|endoftext|>`: the row alone says where attention must stop, and the last token
of a document learns that the document ends. What no document fills is `<|pad|>`.
"""

from bisect import bisect_right, insort
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fgpt_hf.errors import UserError
from fgpt_hf.tokenizer.tokenizer import END_OF_TEXT_ID, PAD_ID

Ids = npt.NDArray[np.uint16]

CROPPING_BUFFER = 1000  # documents that nanochat chooses from
FILLING_CANDIDATES = 48  # more fill a row hardly better


class PackedRows(NamedTuple):
    """`ids`, `(rows, row_length)`, and what packing made of the documents' tokens."""

    ids: Ids
    tokens: int
    padding: int

    def __str__(self) -> str:
        rows, length = self.ids.shape
        share = self.padding / max(1, self.ids.size)
        return f"{self.tokens:,} tokens in {rows:,} rows of {length}: none lost, {share:.2%} padding"


class PackingStats(NamedTuple):
    """What a packing does with the documents' tokens: places of padding count as tokens, separators do not."""

    kept: int
    lost: int
    padding: int

    def __str__(self) -> str:
        tokens, places = max(1, self.kept + self.lost), max(1, self.kept + self.padding)
        return (
            f"keeps {self.kept:,} tokens, loses {self.lost:,} ({self.lost / tokens:.2%}), "
            f"pads {self.padding:,} ({self.padding / places:.2%})"
        )


def pack_documents(documents: Iterable[Ids], row_length: int) -> PackedRows:
    """Pack documents into rows, each document behind an `<|endoftext|>`, losing no token.

    A document longer than a row is cut into pieces, which are packed like documents of their own. UserError if a row
    has no room for a token behind the `<|endoftext|>`.
    """
    if row_length < 2:
        raise UserError(f"rows of {row_length} have no room for <|endoftext|> and a token: make them longer")
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
            raise UserError(f"an item of length {length} does not fit a row of {capacity}")
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


def fullest_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Assign items to rows of `capacity`, by best fit or, where that takes fewer rows, by filling row after row.

    Best fit leaves gaps where most items are of like length, and filling does where most are long.
    """
    return min(best_fit_decreasing(lengths, capacity), _filled_in_turn(lengths, capacity), key=len)


def _filled_in_turn(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Each row gets the next item, and those of the following ones that fill it best (a subset sum)."""
    rows: list[list[int]] = []
    waiting = deque(np.random.default_rng(0).permutation(len(lengths)).tolist())
    while waiting:
        first, *others = (waiting.popleft() for _ in range(min(len(waiting), FILLING_CANDIDATES)))
        # Bit n of a number of `sums` says whether some of the items before fill n places.
        sums = [1 << lengths[first]]
        for item in others:
            sums.append((sums[-1] | sums[-1] << lengths[item]) & ((2 << capacity) - 1))
        filled = sums[-1].bit_length() - 1
        row = [first]
        for number in range(len(others), 0, -1):
            if not sums[number - 1] >> filled & 1:
                row.append(others[number - 1])
                filled -= lengths[others[number - 1]]
        taken = set(row)
        waiting.extendleft(item for item in reversed(others) if item not in taken)
        rows.append(row)
    return rows


def compare_packings(lengths: Sequence[int], row_length: int) -> dict[str, PackingStats]:
    """What this project's packing and the peers' would do with documents of these lengths, by name."""
    return {name: account(lengths, row_length) for name, account in PACKERS.items()}


def _cut(lengths: Sequence[int], row_length: int) -> PackingStats:
    """Best fit of whole documents and of the pieces of long ones: `pack_documents`."""
    room = row_length - 1
    pieces = [min(room, length - start) for length in lengths for start in range(0, length, room)]
    rows = best_fit_decreasing([piece + 1 for piece in pieces], row_length)
    return PackingStats(sum(lengths), 0, len(rows) * row_length - sum(pieces) - len(pieces))


def _truncated(lengths: Sequence[int], row_length: int) -> PackingStats:
    """Best fit of the beginnings of documents: TRL's `packing_strategy="bfd"`."""
    kept = [min(length, row_length - 1) for length in lengths]
    rows = best_fit_decreasing([length + 1 for length in kept], row_length)
    return PackingStats(sum(kept), sum(lengths) - sum(kept), len(rows) * row_length - sum(kept) - len(kept))


def _cropped(lengths: Sequence[int], row_length: int) -> PackingStats:
    """The longest document that fits, and where none fits the shortest one's beginning: nanochat's loader.

    The last row, which no document fills, is dropped.
    """
    waiting = iter(lengths)
    buffer = sorted(length + 1 for _, length in zip(range(CROPPING_BUFFER), waiting))  # noqa: B905
    kept = row_kept = used = 0
    while buffer:
        fitting = bisect_right(buffer, row_length - used)
        length = buffer.pop(fitting - 1 if fitting else 0)
        taken = min(length, row_length - used)
        used, row_kept = used + taken, row_kept + taken - 1
        if used == row_length:
            kept, used, row_kept = kept + row_kept, 0, 0
        if (following := next(waiting, None)) is not None:
            insort(buffer, following + 1)
    return PackingStats(kept, sum(lengths) - kept, 0)


def _concatenated(lengths: Sequence[int], row_length: int) -> PackingStats:
    """One stream cut anywhere: nanoGPT's, transformers' `run_clm` and TRL's "wrapped". Rows begin inside documents."""
    kept, used = 0, 0
    stream = sum(lengths) + len(lengths)
    whole = stream - stream % row_length
    for length in lengths:
        kept += min(length, max(0, whole - used - 1))
        used += length + 1
    return PackingStats(kept, sum(lengths) - kept, 0)


PACKERS: Mapping[str, Callable[[Sequence[int], int], PackingStats]] = {
    "best fit, long documents cut": _cut,
    "best fit, long documents truncated": _truncated,
    "best fit, cropped to the row": _cropped,
    "one stream cut anywhere": _concatenated,
}


def _pieces(document: Ids, length: int) -> Iterator[Ids]:
    return (document[start : start + length] for start in range(0, len(document), length))
