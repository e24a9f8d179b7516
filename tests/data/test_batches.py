"""The rows of a step are the same however they are divided, and a position leads back to exactly where it was."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from fgpt_hf.data.batch_fields import IGNORED
from fgpt_hf.data.batches import Batches, RowChunk, RowsInMemory, ShuffledRows, StreamedRows, StreamPosition, as_batch
from fgpt_hf.errors import UserError
from fgpt_hf.tokenizer.tokenizer import END_OF_TEXT_ID, PAD_ID

LENGTHS = (5, 0, 1, 17, 8, 3)  # of the chunks of an endless stream


def chunks_from(position: StreamPosition) -> Iterator[RowChunk]:
    number = position.epoch
    while True:
        first = sum(LENGTHS) * (number // len(LENGTHS)) + sum(LENGTHS[: number % len(LENGTHS)])
        numbers = np.arange(first, first + LENGTHS[number % len(LENGTHS)], dtype=np.uint16)
        yield RowChunk(np.stack([numbers, numbers], axis=1), StreamPosition("", number))
        number += 1


def make(kind: str, rank: int = 0, processes: int = 1) -> Batches:
    if kind == "streamed":
        return StreamedRows(chunks_from, StreamPosition(""), rank, processes)
    return ShuffledRows(RowsInMemory(np.arange(23, dtype=np.uint16).repeat(2).reshape(23, 2)), 7, rank, processes)


def numbers(batch: dict[str, torch.Tensor]) -> list[int]:
    return batch["input_ids"][:, 0].tolist()


def step(kind: str, count: int, micro_batches: int, processes: int, steps: int) -> list[list[int]]:
    """The rows of each step on all processes."""
    everyone = [make(kind, rank, processes) for rank in range(processes)]
    return [
        [row for _ in range(micro_batches) for batches in everyone for row in numbers(batches.take(count))]
        for _ in range(steps)
    ]


@pytest.mark.parametrize("kind", ["random", "streamed"])
def test_the_rows_of_a_step_are_the_same_however_they_are_divided(kind: str) -> None:
    expected = step(kind, 8, 1, 1, steps=9)
    for count, micro_batches, processes in ((4, 2, 1), (1, 8, 1), (4, 1, 2), (1, 4, 2), (2, 1, 4), (1, 1, 8)):
        assert step(kind, count, micro_batches, processes, steps=9) == expected


@pytest.mark.parametrize("kind", ["random", "streamed"])
@pytest.mark.parametrize("taken", [0, 1, 5, 6, 22, 40])
def test_a_position_leads_back_on_any_number_of_processes(kind: str, taken: int) -> None:
    batches = make(kind)
    if taken:
        batches.take(taken)
    state = batches.state_dict()
    expected = numbers(batches.take(12))
    for processes in (1, 2, 3):
        found = []
        for rank in range(processes):
            resumed = make(kind, rank, processes)
            resumed.load_state_dict(state)
            assert resumed.state_dict() == state
            found += numbers(resumed.take(12 // processes))
        assert found == expected


def test_a_stream_gives_every_row_in_its_order() -> None:
    batches = make("streamed")
    assert [row for _ in range(30) for row in numbers(batches.take(3))] == list(range(90))


def test_an_epoch_of_random_rows_has_each_row_once_and_the_next_one_another_order() -> None:
    batches = make("random")
    epochs = [numbers(batches.take(23)) for _ in range(3)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(23))


def test_random_rows_refuse_a_position_in_other_rows() -> None:
    ids = np.arange(8, dtype=np.uint16).reshape(4, 2)
    others = ids.copy()
    others[2, 1] = 9  # as many rows, and one token that differs
    state = ShuffledRows(RowsInMemory(ids), 0).state_dict()
    ShuffledRows(RowsInMemory(ids.copy()), 0).load_state_dict(state)
    for changed in (others, ids[::-1], ids[:3]):
        with pytest.raises(UserError, match="the training rows are not those of the checkpoint"):
            ShuffledRows(RowsInMemory(changed), 0).load_state_dict(state)


@pytest.mark.parametrize("kind", ["random", "streamed"])
@pytest.mark.parametrize(
    "state",
    [
        {},
        {"position": 3},
        {"position": {"corpus": "", "epoch": 0}, "row": 0},
        {"position": {"corpus": "", "epoch": 0, "start": {"shards": [[]]}}, "row": 0},
        {"position": None, "row": None, "rows": None},
        [],
    ],
)
def test_a_position_of_another_form_is_one_line(kind: str, state: Any) -> None:
    with pytest.raises(UserError, match="the checkpoint's position in the data is of another"):
        make(kind).load_state_dict(state)


def test_no_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="no training rows"):
        ShuffledRows(RowsInMemory(np.empty((0, 4), dtype=np.uint16)), 1)


def test_positions_restart_with_each_document_and_padding_has_no_label() -> None:
    e, p = END_OF_TEXT_ID, PAD_ID
    batch = as_batch(np.array([[e, 5, 6, e, 7, p, p], [e, 1, 2, 3, 4, 5, e]], dtype=np.uint16))
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 0], [0, 1, 2, 3, 4, 5, 0]]
    assert batch["labels"].tolist() == [[e, 5, 6, e, 7, IGNORED, IGNORED], [e, 1, 2, 3, 4, 5, e]]
    assert batch["input_ids"].dtype == torch.int64
