"""Buffers of documents: all of them once, in an order that only the seed decides, from any position on."""

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np
import pytest

from fgpt_hf import retries
from fgpt_hf.config.data_options import TextSource
from fgpt_hf.data import stream
from fgpt_hf.data.positions import ShardPosition
from fgpt_hf.data.splits import NONE_HELD_OUT
from fgpt_hf.data.stream import DocumentBuffer, EpochPosition, PackedBuffer, TokenizerPool, read_buffers, shard_order

pytestmark = pytest.mark.usefixtures("small_buffers")

BATCH = 4


@dataclass
class ListedShard:
    """Texts in parts, handed out four at a time; `breaks` are positions where reading fails, each once."""

    name: str
    parts: list[list[str | None]]
    breaks: set[tuple[int, int]] = field(default_factory=set)
    error: type[Exception] = ConnectionError
    slow: bool = False
    repeats: float = 1.0
    is_validation: bool = False

    @property
    def version(self) -> str:
        return self.name

    def read(self, start: ShardPosition) -> Iterator[tuple[Sequence[str | None], ShardPosition]]:
        first, skipped = start
        for number, part in enumerate(self.parts[first:], start=first):
            for begin in range(0, len(part), BATCH):
                if (number, begin) in self.breaks:
                    self.breaks.discard((number, begin))
                    raise self.error("the line is down")
                time.sleep(random.random() / 500 if self.slow else 0)
                stop = min(begin + BATCH, len(part))
                if number > first or stop > skipped:
                    yield part[max(begin, skipped if number == first else 0) : stop], ShardPosition(number, stop)


def make_shards(count: int, seed: int = 0, **settings: object) -> list[ListedShard]:
    rng = random.Random(seed)
    return [
        ListedShard(
            f"hf://shard {shard}",
            [[f"{shard}.{part}.{n}" for n in range(rng.randint(1, 23))] for part in range(rng.randint(0, 4))],
            **settings,
        )
        for shard in range(count)
    ]


def all_texts(shards: Sequence[ListedShard]) -> list[str]:
    return [text for shard in shards for part in shard.parts for text in part]


def texts_of(found: Sequence[DocumentBuffer]) -> list[str]:
    return [text for buffer in found for block in buffer.blocks for text in block.texts]


def read(shards: Sequence[ListedShard], seed: int = 0, epoch: int = 0) -> list[DocumentBuffer]:
    return list(read_buffers(shard_order(shards, seed, epoch), EpochPosition()))


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "FIRST_WAIT_SECONDS", 0)


@pytest.mark.parametrize("count", [1, 3, 8, 20])
def test_every_document_comes_once_an_epoch(count: int) -> None:
    shards = make_shards(count)
    assert sorted(texts_of(read(shards))) == sorted(all_texts(shards))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    shards = make_shards(20)
    orders = [texts_of(read(shards, seed, epoch)) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert orders[0] != orders[1] and orders[0] != orders[2]


def test_a_buffer_mixes_several_shards() -> None:
    shards = [ListedShard(f"shard {shard}", [[f"{shard}.{n}" for n in range(9)]]) for shard in range(20)]
    begun = {text.split(".")[0] for text in texts_of(read(shards)[:1])}
    assert len(begun) == stream.SHARDS_AT_ONCE


@pytest.mark.parametrize("count", [1, 5, 20])
def test_reading_goes_on_from_the_beginning_and_the_end_of_any_buffer(count: int) -> None:
    order = shard_order(make_shards(count), seed=3, epoch=1)
    found = list(read_buffers(order, EpochPosition()))
    for number, buffer in enumerate(found):
        assert list(read_buffers(order, buffer.begin)) == found[number:]
        assert list(read_buffers(order, buffer.end)) == found[number + 1 :]


def test_the_order_does_not_depend_on_which_shard_answers_first() -> None:
    expected = read(make_shards(9))
    assert all(read(make_shards(9, slow=True)) == expected for _ in range(3))


def test_a_shard_that_breaks_off_is_read_on_from_there() -> None:
    expected = read(make_shards(5))
    shards = make_shards(5)
    for shard in shards:
        shard.breaks = {(part, start) for part in range(4) for start in range(0, 20, 8)}
    assert read(shards) == expected


def test_a_shard_that_keeps_failing_is_named() -> None:
    shards = make_shards(2)
    shards[1].breaks = type("Always", (set,), {"__contains__": lambda *_: True, "discard": lambda *_: None})()
    with pytest.raises(ValueError, match="shard 1 cannot be read.*the line is down"):
        read(shards)


def test_an_error_that_waiting_does_not_mend_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "FIRST_WAIT_SECONDS", 1000)
    shards = make_shards(1, seed=1, breaks={(0, 0)}, error=FileNotFoundError)
    with pytest.raises(ValueError, match="shard 0 cannot be read"):
        read(shards)


def test_empty_texts_are_left_out() -> None:
    shard = ListedShard("shard", [["a", None, "", "b"], [None] * 9, ["c"]])
    assert texts_of(read([shard])) == ["a", "b", "c"]


def test_long_texts_make_smaller_blocks_that_can_be_continued_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "BLOCK_CHARACTERS", 20)
    monkeypatch.setattr(stream, "BLOCKS_PER_BUFFER", 1)
    order = [ListedShard("shard", [["x" * length for length in (1, 30, 9, 9, 9, 50, 1)]])]
    found = list(read_buffers(order, EpochPosition()))
    assert [list(map(len, buffer.blocks[0].texts)) for buffer in found] == [[1, 30], [9, 9], [9, 50], [1]]
    for number, buffer in enumerate(found):
        assert list(read_buffers(order, buffer.end)) == found[number + 1 :]


def test_tiny_shards_are_read_together_until_their_documents_fill_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(0)
    shards = [ListedShard(f"shard {n}", [["word " * chance.randint(1, 400)]]) for n in range(3000)]
    source = TextSource(max_position_embeddings=256)
    monkeypatch.setattr(stream, "BUFFER_CHARACTERS", 500_000)
    with closing(TokenizerPool(source, workers=1, rule=NONE_HELD_OUT)) as pool:
        found = list(pool.packed_buffers(shards, EpochPosition()))
    assert len(found) > 3
    rows = [buffer.rows["train"] for buffer in found]
    assert sum(packed.padding for packed in rows) < 0.01 * sum(packed.ids.size for packed in rows)
    again = list(pool_buffers_from(shards, source, found[1].end))
    assert all(np.array_equal(a.rows["train"].ids, b.rows["train"].ids) for a, b in zip(again, found[2:], strict=True))


def pool_buffers_from(shards: Sequence[ListedShard], source: TextSource, start: EpochPosition) -> list[PackedBuffer]:
    with closing(TokenizerPool(source, workers=1, rule=NONE_HELD_OUT)) as pool:
        return list(pool.packed_buffers(shards, start))


def test_shards_for_validation_give_the_same_buffers_alone() -> None:
    held_out = make_shards(11, seed=1, is_validation=True)
    alone, together = (list(read_buffers(each, EpochPosition())) for each in (held_out, held_out + make_shards(11)))
    blocks = [[block for block in buffer.blocks if block.is_validation] for buffer in together]
    assert [buffer.blocks for buffer in alone] == [each for each in blocks if each]
