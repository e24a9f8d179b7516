"""Pack documents into rows of equal length by best fit, losing no token.

Every document in a row begins with `<|endoftext|>`: the row alone says where attention must stop, and the last token
of a document learns that the document ends. The rest of a row is `<|pad|>`. A document longer than a row is cut into
pieces that are packed like documents. On 8,000 documents of 1,500 tokens and rows of 256, this pads less than 0.01 %;
cutting one stream anywhere pads nothing, but rows then begin inside documents, and truncating long documents (TRL's
`bfd`) loses 87 % of these tokens. `benchmarks/packing.py` compares them.
"""

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fgpt_hf.errors import UserError
from fgpt_hf.tokenizer.tokenizer import END_OF_TEXT_ID, PAD_ID

Ids = npt.NDArray[np.uint16]

CANDIDATES = 48  # items that one row is filled from; more fill it hardly better


class PackedRows(NamedTuple):
    """Packed documents.

    Attributes:
        ids: the token ids, `(rows, row_length)`.
        tokens: the number of tokens of the documents, without separators.
        padding: the number of `<|pad|>` in the rows.
    """

    ids: Ids
    tokens: int
    padding: int


def pack_documents(documents: Iterable[Ids], row_length: int) -> PackedRows:
    """Pack documents into rows, each document behind an `<|endoftext|>`.

    A document longer than a row is cut into pieces, which are packed like documents of their own.

    Raises:
        UserError: a row has no room for a token behind the `<|endoftext|>`.

    Example:
        >>> documents = [np.arange(length, dtype=np.uint16) for length in (3, 9)]
        >>> pack_documents(documents, row_length=8).ids.tolist()
        [[50256, 0, 1, 2, 3, 4, 5, 6], [50256, 0, 1, 2, 50256, 7, 8, 50261]]
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

    The number of rows is at most 11/9 of the fewest possible (Johnson 1973). Returns the indices of each row's items.

    Raises:
        UserError: an item is empty or longer than a row.

    Example:
        >>> best_fit_decreasing([5, 3, 8, 2], capacity=8)
        [[2], [0, 1], [3]]
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


def assign_to_fewest_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Assign items to rows of `capacity`, by best fit or, if that needs fewer rows, by filling one row after another.

    Best fit leaves gaps if most items are of similar length, and filling does if most are long. Returns the indices of
    each row's items.

    Example:
        >>> lengths = [4, 4, 3, 3, 3, 3]
        >>> len(best_fit_decreasing(lengths, capacity=10)), len(assign_to_fewest_rows(lengths, capacity=10))
        (3, 2)
    """
    return min(best_fit_decreasing(lengths, capacity), _filled_in_turn(lengths, capacity), key=len)


def _filled_in_turn(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Give each row the next item, and those of the following ones that fill it best (a subset sum)."""
    rows: list[list[int]] = []
    waiting = deque(np.random.default_rng(0).permutation(len(lengths)).tolist())
    while waiting:
        first, *others = (waiting.popleft() for _ in range(min(len(waiting), CANDIDATES)))
        # Bit n of `sums[k]` says whether some of the first k others, with the first item, have n tokens together.
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


def _pieces(document: Ids, length: int) -> Iterator[Ids]:
    return (document[start : start + length] for start in range(0, len(document), length))
