"""Packing loses no token and pads little."""

import random

import numpy as np
import pytest

from fgpt_hf.data.packing import (
    assign_to_fewest_rows,
    best_fit_decreasing,
    pack_documents,
)
from fgpt_hf.tokenizer.tokenizer import END_OF_TEXT_ID, PAD_ID


def lengths_of(seed: int, count: int = 400, longest: int = 200) -> list[int]:
    rng = random.Random(seed)
    return [rng.randint(1, longest) for _ in range(count)]


def documents_of(lengths: list[int]) -> list[np.ndarray]:
    starts = np.cumsum([0, *lengths])
    return [np.arange(start, start + length, dtype=np.uint16) for start, length in zip(starts, lengths, strict=False)]


def pieces_of(rows: np.ndarray) -> list[list[int]]:
    """Return the tokens behind each <|endoftext|>."""
    pieces: list[list[int]] = []
    for row in rows.tolist():
        assert row[0] == END_OF_TEXT_ID  # a row starts at a document
        for token in row:
            if token == END_OF_TEXT_ID:
                pieces.append([])
            elif token != PAD_ID:
                pieces[-1].append(token)
    return pieces


@pytest.mark.parametrize("row_length", [2, 16, 64, 256])
def test_every_token_is_in_the_rows_once_and_in_order(row_length: int) -> None:
    documents = documents_of(lengths_of(1))
    packed = pack_documents(documents, row_length)
    expected = [
        document[start : start + row_length - 1].tolist()
        for document in documents
        for start in range(0, len(document), row_length - 1)
    ]
    assert sorted(pieces_of(packed.ids)) == sorted(expected)
    assert packed.tokens == sum(map(len, documents))
    assert packed.padding == (packed.ids == PAD_ID).sum()


def test_best_fit_leaves_no_row_that_an_item_of_a_later_row_would_have_fitted() -> None:
    lengths = lengths_of(2, longest=64)
    rows = best_fit_decreasing(lengths, 64)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    room = [64 - sum(lengths[item] for item in row) for row in rows]
    for number, row in enumerate(rows):
        assert all(earlier < lengths[row[0]] for earlier in room[:number])


def test_best_fit_is_near_the_fewest_rows() -> None:
    lengths = lengths_of(0, count=5_000, longest=100)
    assert len(best_fit_decreasing(lengths, 100)) <= 1.01 * np.ceil(sum(lengths) / 100)


@pytest.mark.parametrize("length", [0, 101])
def test_an_item_that_fits_no_row_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"length {length} does not fit a row of 100"):
        best_fit_decreasing([5, length], 100)


def test_rows_without_room_for_a_token_are_refused() -> None:
    with pytest.raises(ValueError, match="rows of 1 have no room"):
        pack_documents(documents_of([3]), 1)


def test_no_documents_make_no_rows() -> None:
    assert pack_documents([], 16).ids.shape == (0, 16)


LENGTHS = {
    "of every length": lengths_of(3, 2000, 256),
    "of like length": [40 + number % 20 for number in range(2000)],
    "mostly long": [200 if number % 3 else 10 + number % 40 for number in range(2000)],
    "few": [100, 100, 100],
    "all as long as a row": [256] * 10,
}


@pytest.mark.parametrize("kind", LENGTHS)
def test_full_rows_hold_every_item_once_in_as_few_rows_as_best_fit_or_fewer(kind: str) -> None:
    lengths = LENGTHS[kind]
    rows = assign_to_fewest_rows(lengths, 256)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    assert all(sum(lengths[item] for item in row) <= 256 for row in rows)
    assert len(rows) <= len(best_fit_decreasing(lengths, 256))


def test_items_of_like_length_fill_rows_without_gaps() -> None:
    lengths = LENGTHS["of like length"]
    assert len(assign_to_fewest_rows(lengths, 256)) * 256 < 1.005 * sum(lengths)
