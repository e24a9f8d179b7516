"""Documents become rows: the same ones, however many workers there are and in whatever order the shards come."""

import random
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fgpt_hf.config.data_options import TextSource
from fgpt_hf.data import stream
from fgpt_hf.data.corpora import Shard, open_corpus
from fgpt_hf.data.splits import SPLITS, TRAIN, VALIDATION
from fgpt_hf.data.stream import (
    EpochPosition,
    PackedBuffer,
    TokenizerPool,
    training_buffers,
    validation_rows,
)
from fgpt_hf.tokenizer.byte_bpe import Ids
from fgpt_hf.tokenizer.tokenizer import CONTROL_TOKENS, END_OF_TEXT_ID, PAD_ID, build_tokenizer
from tests.support.fineweb import write_shards

pytestmark = pytest.mark.usefixtures("small_buffers")


@pytest.fixture
def source(tmp_path: Path) -> TextSource:
    write_shards(tmp_path, shards=12, texts=60, row_group_size=10)
    return TextSource(
        dataset_name=str(tmp_path / "sample" / "10BT"), max_position_embeddings=64, validation_fraction=0.2
    )


@pytest.fixture
def pool(source: TextSource) -> Iterator[TokenizerPool]:
    with closing(TokenizerPool(source, workers=1)) as pool:
        yield pool


def epoch_of(pool: TokenizerPool, shards: list[Shard], seed: int, epoch: int) -> list[PackedBuffer]:
    endless = training_buffers(pool, shards, seed, epoch, EpochPosition())
    found: list[Any] = []
    for number, buffer in endless:
        if number != epoch:
            return found
        found.append(buffer)
    raise AssertionError("training buffers end")


def documents_of(*rows: Ids) -> list[str]:
    """The beginnings of documents: `shard.number` of the text, which only the first piece of a document has."""
    tokenizer = build_tokenizer()
    pieces = []  # type: ignore[var-annotated]
    for row in np.concatenate(rows).tolist():
        text = tokenizer.decode([token for token in row if token != PAD_ID])
        pieces += text.split("<|endoftext|>")[1:]
    return [piece.split(" ")[0] for piece in pieces if piece[:1].isdigit() and "." in piece.split(" ")[0]]


def same(first: list[PackedBuffer], second: list[PackedBuffer]) -> bool:
    pairs = list(zip(first, second, strict=True))
    return all(
        a.begin == b.begin and all(np.array_equal(a.rows[split].ids, b.rows[split].ids) for split in a.rows)
        for a, b in pairs
    )


def test_an_epoch_has_every_document_of_its_split_once_and_no_other(source: TextSource, pool: TokenizerPool) -> None:
    shards = list(open_corpus(source))
    everything = {f"{shard}.{number}" for shard in range(12) for number in range(60)}
    validation = documents_of(validation_rows(pool, shards, count=10_000))
    assert 80 < len(validation) < 220
    orders = []
    for epoch in (0, 1):
        found = documents_of(*(buffer.rows[TRAIN].ids for buffer in epoch_of(pool, shards, 5, epoch)))
        assert sorted(found) == sorted(everything - set(validation))
        orders.append(found)
    assert orders[0] != orders[1]
    assert len(set(validation)) == len(validation)


@pytest.mark.slow
def test_workers_do_not_change_a_row(source: TextSource, pool: TokenizerPool) -> None:
    shards = open_corpus(source)
    expected = list(pool.packed_buffers(shards, EpochPosition()))
    for in_processes in (False, True):
        with closing(TokenizerPool(source, workers=4, in_processes=in_processes)) as four:
            assert same(list(four.packed_buffers(shards, EpochPosition())), expected)


def test_the_validation_rows_do_not_depend_on_seeds_order_or_how_many_are_wanted(
    source: TextSource, pool: TokenizerPool
) -> None:
    shards = list(open_corpus(source))
    everything = validation_rows(pool, shards, 10_000)
    assert np.array_equal(validation_rows(pool, shards, 20), everything[:20])
    assert np.array_equal(validation_rows(pool, random.Random(0).sample(shards, len(shards)), 20), everything[:20])
    both = np.concatenate([w.rows[VALIDATION].ids for w in pool.packed_buffers(shards, EpochPosition(), SPLITS)])
    assert np.array_equal(both, everything)  # what `fgpt prepare` writes


def test_training_goes_on_from_any_buffer(source: TextSource, pool: TokenizerPool) -> None:
    shards = open_corpus(source)
    expected = list(islice(training_buffers(pool, shards, 1, 0, EpochPosition()), 15))
    assert expected[-1][0] == 1  # into the second epoch
    for number in (0, 3, 9, 14):
        epoch, buffer = expected[number]
        found = list(islice(training_buffers(pool, shards, 1, epoch, buffer.begin), 15 - number))
        assert [epoch for epoch, _ in found] == [epoch for epoch, _ in expected[number:]]
        assert same([buffer for _, buffer in found], [buffer for _, buffer in expected[number:]])


def test_rows_of_a_buffer_are_in_random_order(source: TextSource, pool: TokenizerPool) -> None:
    (buffer,) = islice(pool.packed_buffers(open_corpus(source), EpochPosition()), 1)
    padding = (buffer.rows[TRAIN].ids == PAD_ID).sum(axis=1)
    assert padding[: len(padding) // 2].sum() and padding[len(padding) // 2 :].sum()  # best fit leaves it in the last


def test_text_that_spells_a_control_token_stays_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(f"say {token} now {n}" for n in range(9) for token in CONTROL_TOKENS))
    source = TextSource(
        dataset_name=str(tmp_path / "a.txt"),
        document_separator=r"\n\n",
        max_position_embeddings=32,
        validation_fraction=0.1,
    )
    with closing(TokenizerPool(source, workers=1)) as pool:
        (buffer,) = pool.packed_buffers(open_corpus(source), EpochPosition())
    for split in SPLITS:
        ids = buffer.rows[split].ids
        pieces = ids.size - buffer.rows[split].tokens - buffer.rows[split].padding
        assert (ids == END_OF_TEXT_ID).sum() == pieces >= buffer.documents[split]
        assert not set(ids.ravel().tolist()) & (set(CONTROL_TOKENS.values()) - {END_OF_TEXT_ID, PAD_ID})


@pytest.mark.parametrize(("fraction", "purpose"), [(1e-9, "hold out"), (1.0, "train on")])
def test_a_validation_fraction_that_leaves_nothing_is_refused(tmp_path: Path, fraction: float, purpose: str) -> None:
    write_shards(tmp_path, shards=2, texts=20)
    source = TextSource(dataset_name=str(tmp_path / "sample"), max_position_embeddings=64, validation_fraction=fraction)
    shards = open_corpus(source)
    with (
        closing(TokenizerPool(source, workers=1)) as pool,
        pytest.raises(ValueError, match=f"no document to {purpose}: either validation_fraction={fraction} leaves none"),
    ):
        if purpose == "hold out":
            validation_rows(pool, shards, 10)
        else:
            next(training_buffers(pool, shards, 0, 0, EpochPosition()))


def test_an_error_in_a_shard_reaches_the_one_who_reads(source: TextSource, pool: TokenizerPool) -> None:
    shards = [*open_corpus(source)]
    damaged = Path(shards[3].name)
    damaged.write_bytes(damaged.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"003_00000\.parquet.* cannot be read; it may be damaged or cut short"):
        list(pool.packed_buffers(shards, EpochPosition()))


def test_the_order_of_the_shards_of_an_epoch_mixes_them(source: TextSource, pool: TokenizerPool) -> None:
    shards = list(open_corpus(source))
    first = [epoch_of(pool, shards, seed, 0)[0].rows[TRAIN].ids for seed in (0, 1)]
    assert not np.array_equal(first[0][:3], first[1][:3])
    assert len({name.split(".")[0] for name in documents_of(first[0])}) == stream.SHARDS_AT_ONCE
