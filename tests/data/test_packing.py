"""Packing loses no token and pads little."""

import random
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fgpt_hf.data.packing import (
    assign_to_fewest_rows,
    best_fit_decreasing,
    count_cut,
    pack_documents,
    plan_rows,
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


@pytest.mark.parametrize("row_length", [2, 3, 16, 64, 256])
def test_every_token_is_in_the_rows_once_and_in_the_order_of_its_document(row_length: int) -> None:
    documents = documents_of(lengths_of(1))
    packed = pack_documents(documents, row_length)
    pieces = {piece[0]: piece for piece in pieces_of(packed.ids)}
    found = [token for start in sorted(pieces) for token in pieces[start]]  # all tokens of these documents differ
    assert found == np.concatenate(documents).tolist()
    assert packed.tokens == sum(map(len, documents))
    assert packed.padding == (packed.ids == PAD_ID).sum()


any_lengths = st.one_of(
    st.lists(st.integers(1, 3000), max_size=300),
    st.tuples(st.integers(1, 1500), st.integers(1, 400)).map(lambda drawn: [drawn[0]] * drawn[1]),
    st.tuples(st.integers(1, 1200), st.integers(0, 300), st.integers(1, 400), st.integers(0, 99)).map(
        lambda drawn: [random.Random(n + drawn[3]).randint(drawn[0], drawn[0] + drawn[1]) for n in range(drawn[2])]
    ),
)


@given(any_lengths, st.sampled_from([256, 512, 1024]))
def test_rows_pad_less_than_one_percent_and_hold_every_document_once_whatever_the_lengths(
    lengths: list[int], row_length: int
) -> None:
    plan = plan_rows(lengths, row_length)
    spans: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for row in plan:
        assert sum(piece.length for piece in row) <= row_length
        for document, start, stop in row:
            spans[document].append((start, stop))
    for document, length in enumerate(lengths):
        starts, stops = zip(*sorted(spans[document]), strict=True)
        assert (0, *stops) == (*starts, length)
        assert all(start < stop for start, stop in spans[document])
    padding = len(plan) * row_length - sum(lengths) - sum(map(len, plan))
    assert padding < 0.01 * len(plan) * row_length + row_length  # and one row, which nothing can fill


@given(any_lengths, st.sampled_from([256, 512, 1024]))
def test_documents_are_cut_only_where_best_fit_needs_more_rows_and_at_most_one_for_each_of_the_others(
    lengths: list[int], row_length: int
) -> None:
    plan = plan_rows(lengths, row_length)
    necessary = [-(-length // (row_length - 1)) for length in lengths]
    room = row_length - 1
    pieces = [min(room, length - start) + 1 for length in lengths for start in range(0, length, room)]
    best_fit = best_fit_decreasing(pieces, row_length)
    cuts = sum(map(len, plan)) - sum(necessary)
    assert len(plan) < len(best_fit) or cuts == 0
    assert cuts < max(1, len(plan))
    assert count_cut(plan, lengths, row_length) <= cuts


@pytest.mark.parametrize(
    ("mean", "deviation", "most_cut"),
    [(600, 80, 0.4), (425, 66, 0.15), (200, 27, 0.001), (500, 350, 0.05), (250, 200, 0)],
)
def test_few_documents_are_cut_the_fewer_the_more_their_lengths_vary(
    mean: int, deviation: int, most_cut: float
) -> None:
    drawn = np.random.default_rng(0).normal(mean, deviation, 4000)
    lengths = np.clip(drawn, 1, None).astype(int).tolist()
    plan = plan_rows(lengths, 1024)
    padding = len(plan) * 1024 - sum(lengths) - sum(map(len, plan))
    assert padding < 0.01 * len(plan) * 1024
    assert count_cut(plan, lengths, 1024) <= most_cut * len(lengths)


def test_the_end_of_a_cut_document_begins_with_a_separator_in_another_row() -> None:
    packed = pack_documents(documents_of([6, 6, 6]), 11)
    assert packed.ids.shape == (2, 11)
    assert (packed.padding, packed.cut) == (0, 1)
    assert sorted(map(len, pieces_of(packed.ids))) == [3, 3, 6, 6]


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
