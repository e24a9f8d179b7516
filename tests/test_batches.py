"""Rows lose nothing, hide documents from each other, and come in an order that no division changes."""

import numpy as np
import pytest
import torch

from fgpt_hf.batches import IGNORED, RandomRows, as_batch, best_fit_decreasing, pack_documents
from fgpt_hf.tokenizer import END_OF_TEXT_ID, PAD_ID


def documents(count: int = 200, longest: int = 70) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, 50_000, random.integers(0, longest)).astype(np.uint16) for _ in range(count)]


def test_packing_keeps_every_token_of_every_document() -> None:
    packed = pack_documents(documents(), row_length=32)
    text = packed.ids[(packed.ids != END_OF_TEXT_ID) & (packed.ids != PAD_ID)]
    originals = np.concatenate(documents())
    assert np.array_equal(np.sort(text), np.sort(originals))
    assert packed.tokens == len(originals)
    assert packed.padding == (packed.ids == PAD_ID).sum()


def test_a_document_that_fits_a_row_is_not_cut() -> None:
    for document in (d for d in documents(longest=31) if len(d)):
        rows = pack_documents(documents(longest=31), row_length=32).ids
        whole = np.concatenate([[END_OF_TEXT_ID], document])
        windows = np.lib.stride_tricks.sliding_window_view(rows, len(whole), axis=1)
        assert (windows == whole).all(axis=2).any()
        break


def test_a_long_document_is_cut_into_full_rows_and_a_rest() -> None:
    packed = pack_documents([np.arange(70, dtype=np.uint16)], row_length=32)
    assert packed.ids.shape == (3, 32)
    assert packed.padding == 3 * 32 - 70 - 3
    assert (packed.ids[:, 0] == END_OF_TEXT_ID).all()


def test_best_fit_is_near_the_fewest_rows_and_never_overfull() -> None:
    lengths = np.random.default_rng(1).integers(1, 100, 5_000).tolist()
    rows = best_fit_decreasing(lengths, 100)
    assert sorted(item for row in rows for item in row) == list(range(5_000))
    assert max(sum(lengths[item] for item in row) for row in rows) <= 100
    assert len(rows) <= 1.01 * np.ceil(sum(lengths) / 100)


@pytest.mark.parametrize("length", [0, 101])
def test_an_item_that_fits_no_row_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"length {length} does not fit a row of 100"):
        best_fit_decreasing([5, length], 100)


def test_positions_restart_with_each_document_and_padding_is_not_scored() -> None:
    row = np.array([[END_OF_TEXT_ID, 5, 6, END_OF_TEXT_ID, 7, PAD_ID, PAD_ID]], dtype=np.uint16)
    batch = as_batch(row)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 0]]
    assert batch["labels"].tolist() == [[END_OF_TEXT_ID, 5, 6, END_OF_TEXT_ID, 7, IGNORED, IGNORED]]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def numbered_rows(count: int = 23) -> np.ndarray:
    return np.repeat(np.arange(count, dtype=np.uint16)[:, None], 4, axis=1)


def numbers(batch: dict[str, torch.Tensor]) -> list[int]:
    return batch["input_ids"][:, 0].tolist()


def test_an_epoch_holds_every_row_once_and_the_next_is_in_another_order() -> None:
    batches = RandomRows(numbered_rows(), seed=0)
    first, second = numbers(batches.take(23)), numbers(batches.take(23))
    assert sorted(first) == sorted(second) == list(range(23))
    assert first != second != list(range(23))


def test_the_rows_of_a_step_do_not_depend_on_how_they_are_divided() -> None:
    whole = RandomRows(numbered_rows(), seed=7)
    halves = RandomRows(numbered_rows(), seed=7)
    ranks = [RandomRows(numbered_rows(), seed=7, rank=rank, processes=2) for rank in range(2)]
    for _ in range(9):
        expected = numbers(whole.take(8))
        assert numbers(halves.take(4)) + numbers(halves.take(4)) == expected
        assert numbers(ranks[0].take(4)) + numbers(ranks[1].take(4)) == expected
    assert whole.state_dict() == halves.state_dict() == ranks[0].state_dict() == ranks[1].state_dict()


def test_a_position_is_gone_on_from_with_another_number_of_processes() -> None:
    undisturbed = RandomRows(numbered_rows(), seed=7)
    expected = [numbers(undisturbed.take(6)) for _ in range(10)]
    began = RandomRows(numbered_rows(), seed=7)
    for _ in range(5):
        began.take(6)
    ranks = [RandomRows(numbered_rows(), seed=7, rank=rank, processes=3) for rank in range(3)]
    for batches in ranks:
        batches.load_state_dict(began.state_dict())
    for rows in expected[5:]:
        assert [number for batches in ranks for number in numbers(batches.take(2))] == rows


def test_no_rows_is_an_error() -> None:
    with pytest.raises(ValueError, match="no training rows"):
        RandomRows(np.empty((0, 4), dtype=np.uint16), seed=0)
