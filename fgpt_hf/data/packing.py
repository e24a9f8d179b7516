"""Pack documents into rows of equal length, losing no token and padding less than 1 %.

Every document in a row begins with the same token, `<|endoftext|>` in the project's vocabulary: the row alone says
where attention must stop, and the last token of a document learns that the document ends. The rest of a row is padding.
A document longer than a row is cut into pieces that are packed like documents, and each piece begins with that token.

Best fit needs no other cut where lengths vary: 8,000 documents of 1,500 tokens on average fill rows of 256 to 99.99 %.
Where it would leave gaps, since two documents are too long for a row and one is too short, the rows are filled again:
with whole documents that fill a row together if there are any, or else with the beginning of a document that continues
in the next row. `benchmarks/packing.py` compares this with other packings.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fgpt_hf.errors import UserError
from fgpt_hf.tokenizer.byte_bpe import Ids
from fgpt_hf.tokenizer.document_encoder import PROJECT_ENCODER, DocumentEncoder

CANDIDATES = 48  # items that one row is filled from; more fill it hardly better
MAX_PADDING = 0.0095  # of the documents' tokens; documents are cut where there would be more


class Piece(NamedTuple):
    """The tokens of a document from `start` to `stop`, which a row holds after the token that begins documents."""

    document: int
    start: int
    stop: int

    @property
    def length(self) -> int:
        """The tokens of a row that it takes, the first one included."""
        return self.stop - self.start + 1


class PackedRows(NamedTuple):
    """Packed documents.

    Attributes:
        ids: the token ids, `(rows, row_length)`.
        tokens: the number of tokens of the documents, without separators.
        padding: the number of padding tokens in the rows.
        cut: the number of documents in more pieces than their length makes necessary, so that rows are full.
    """

    ids: Ids
    tokens: int
    padding: int
    cut: int


def pack_documents(documents: Iterable[Ids], row_length: int, encoder: DocumentEncoder = PROJECT_ENCODER) -> PackedRows:
    """Pack documents into rows, each document or piece of one after the token that begins documents.

    An encoder that does not pack gives each piece a row of its own.

    Raises:
        UserError: a row has no room for a token after the `<|endoftext|>`.

    Example:
        >>> documents = [np.arange(length, dtype=np.uint16) for length in (3, 9)]
        >>> pack_documents(documents, row_length=8).ids.tolist()
        [[50256, 0, 1, 2, 3, 4, 5, 6], [50256, 0, 1, 2, 50256, 7, 8, 50261]]
    """
    documents = list(documents)
    lengths = [len(document) for document in documents]
    plan = plan_rows(lengths, row_length) if encoder.packs else one_piece_per_row(lengths, row_length)
    ids = np.full((len(plan), row_length), encoder.pad, dtype=encoder.dtype)
    for row, pieces in zip(ids, plan, strict=True):
        begin = 0
        for document, start, stop in pieces:
            row[begin] = encoder.start
            end = begin + 1 + stop - start
            row[begin + 1 : end] = documents[document][start:stop]
            begin = end
    tokens = sum(lengths)
    padding = ids.size - tokens - sum(map(len, plan))
    return PackedRows(ids, tokens, padding, count_cut(plan, lengths, row_length))


def plan_rows(lengths: Sequence[int], row_length: int) -> list[list[Piece]]:
    """Return the pieces in each row, given the documents' lengths in tokens without `<|endoftext|>`.

    The rows are those of best fit. Where these pad too much, only the fullest ones are, and the others are filled again
    by cutting documents, if that needs fewer rows.

    Raises:
        UserError: a row has no room for a token after the `<|endoftext|>`.

    Example:
        >>> plan_rows([6, 6, 6], row_length=11)
        [[Piece(document=2, start=0, stop=6), Piece(document=0, start=0, stop=3)], \
[Piece(document=0, start=3, stop=6), Piece(document=1, start=0, stop=6)]]
    """
    pieces = [piece for row in one_piece_per_row(lengths, row_length) for piece in row]
    sizes = [piece.length for piece in pieces]
    allowed = int(MAX_PADDING * sum(sizes))
    best_fit = best_fit_decreasing(sizes, row_length)
    kept, padding = _fullest_rows([row_length - sum(sizes[index] for index in row) for row in best_fit], allowed // 2)
    others = [row for row, is_kept in zip(best_fit, kept, strict=True) if not is_kept]
    refilled = _fill_by_cutting([pieces[index] for row in others for index in row], row_length, allowed - padding)
    if len(refilled) >= len(others):
        return [[pieces[index] for index in row] for row in best_fit]
    return [[pieces[index] for index in row] for row, is_kept in zip(best_fit, kept, strict=True) if is_kept] + refilled


def one_piece_per_row(lengths: Sequence[int], row_length: int) -> list[list[Piece]]:
    """Return a row for each document, or for each of as few pieces of it as its length makes necessary.

    Raises:
        UserError: a row has no room for a token after the one that begins documents.

    Example:
        >>> one_piece_per_row([6], row_length=5)
        [[Piece(document=0, start=0, stop=4)], [Piece(document=0, start=4, stop=6)]]
    """
    if row_length < 2:
        raise UserError(
            f"rows of {row_length} have no room for a token after the one that begins a document: make them longer"
        )
    return [[piece] for piece in _pieces(np.array(lengths, dtype=np.int64), row_length - 1)]


def _pieces(lengths: npt.NDArray[np.int64], room: int) -> list[Piece]:
    """Return the documents in as few pieces of at most `room` tokens as their lengths, `(N,)`, make necessary."""
    counts = -(-lengths // room)
    documents = np.repeat(np.arange(len(lengths)), counts)
    starts = room * (np.arange(len(documents)) - np.repeat(np.cumsum(counts) - counts, counts))
    stops = np.minimum(starts + room, lengths[documents])
    return list(map(Piece, documents.tolist(), starts.tolist(), stops.tolist()))


def _fullest_rows(gaps: Sequence[int], allowed: int) -> tuple[list[bool], int]:
    """Return which rows belong to the fullest, as many as have the padding allowed together, and how much they have."""
    fullest = np.argsort(gaps, kind="stable")
    padding = np.cumsum(np.array(gaps, dtype=np.int64)[fullest])
    count = int(np.searchsorted(padding, allowed, side="right"))
    is_kept = np.zeros(len(gaps), dtype=np.bool_)
    is_kept[fullest[:count]] = True
    return is_kept.tolist(), int(padding[count - 1]) if count else 0


def count_cut(plan: Sequence[Sequence[Piece]], lengths: Sequence[int], row_length: int) -> int:
    """Return the number of documents that are in more pieces than their length makes necessary.

    Example:
        >>> count_cut(plan_rows([6, 6, 6], row_length=11), [6, 6, 6], row_length=11)
        1
    """
    necessary = [-(-length // (row_length - 1)) for length in lengths]
    if sum(map(len, plan)) == sum(necessary):
        return 0
    pieces = Counter(piece.document for row in plan for piece in row)
    return sum(count > necessary[document] for document, count in pieces.items())


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
    """Give each row the next item, and those of the following ones that fill it best."""
    rows: list[list[int]] = []
    waiting = deque(np.random.default_rng(0).permutation(len(lengths)).tolist())
    while waiting:
        first, *others = (waiting.popleft() for _ in range(min(len(waiting), CANDIDATES)))
        chosen = set(_fullest([lengths[item] for item in others], lengths[first], capacity))
        rows.append([first, *(item for number, item in enumerate(others) if number in chosen)])
        waiting.extendleft(item for number, item in reversed(list(enumerate(others))) if number not in chosen)
    return rows


def _fill_by_cutting(pieces: Sequence[Piece], capacity: int, allowed: int) -> list[list[Piece]]:
    """Fill each row with whole pieces or, where none make it full, with the beginning of a piece.

    What is left of that piece begins the next row. All rows but the last have their share of the padding `allowed`, or
    less.
    """
    rows_needed = sum(piece.length for piece in pieces) // capacity + 1
    full = capacity - max(1, min(allowed // rows_needed, capacity // 8))
    rows: list[list[Piece]] = []
    waiting = deque(pieces[index] for index in np.random.default_rng(0).permutation(len(pieces)).tolist())
    while waiting:
        row = [waiting.popleft()]
        used = row[0].length
        while waiting and used < full:
            candidates = [waiting.popleft() for _ in range(min(len(waiting), CANDIDATES))]
            chosen = set(_fullest([piece.length for piece in candidates], used, capacity, full))
            filling = [piece for index, piece in enumerate(candidates) if index in chosen]
            others = [piece for index, piece in enumerate(candidates) if index not in chosen]
            if others and used + sum(piece.length for piece in filling) < full:
                filling, others = _cut_to_fill(candidates, capacity - used, capacity - full)
            row += filling
            used += sum(piece.length for piece in filling)
            waiting.extendleft(reversed(others))
        rows.append(row)
    return rows


def _cut_to_fill(pieces: Sequence[Piece], gap: int, tolerated: int) -> tuple[list[Piece], list[Piece]]:
    """Return what fills a gap, pieces in turn and the beginning of the next one, and what is left, its end first.

    Neither part of that one is shorter than the padding that is tolerated.
    """
    index = 0
    while pieces[index].length <= gap:
        gap -= pieces[index].length
        index += 1
    document, start, stop = pieces[index]
    middle = start + min(gap, pieces[index].length - tolerated) - 1
    begin, end = Piece(document, start, middle), Piece(document, middle, stop)
    return [*pieces[:index], begin], [end, *pieces[index + 1 :]]


def _fullest(lengths: Sequence[int], used: int, capacity: int, enough: int | None = None) -> list[int]:
    """Return which items bring a row that holds `used` tokens closest to `capacity` (a subset sum).

    Args:
        enough: the number of tokens at which a row counts as full, and no better filling is sought.
    """
    # Bit n of `sums[k]` says whether some of the first k items bring the row to n tokens.
    sums, within = [1 << used], (2 << capacity) - 1
    for length in lengths:
        sums.append((sums[-1] | sums[-1] << length) & within)
        if enough is not None and sums[-1] >> enough:
            break
    filled = sums[-1].bit_length() - 1
    chosen = []
    for number in range(len(sums) - 1, 0, -1):
        if not sums[number - 1] >> filled & 1:
            chosen.append(number - 1)
            filled -= lengths[number - 1]
    return chosen
