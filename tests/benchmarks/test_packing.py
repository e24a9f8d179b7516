"""The comparison of packings says of each what that packing does."""

import pytest

from benchmarks.packing import PACKERS, PackingStats, compare_packings
from fgpt_hf.data.packing import pack_documents
from fgpt_hf.tokenizer.tokenizer import END_OF_TEXT_ID
from tests.data.test_packing import documents_of, lengths_of

OURS, BFD_SPLIT, BFD, CROPPED, STREAM = PACKERS


def test_no_documents_make_no_rows() -> None:
    assert set(compare_packings([], 16).values()) == {PackingStats(0, 0, 0, 0)}


@pytest.mark.parametrize("row_length", [16, 64, 512])
def test_our_packing_is_compared_as_it_packs(row_length: int) -> None:
    lengths = lengths_of(3)
    packed = pack_documents(documents_of(lengths), row_length)
    assert PACKERS[OURS](lengths, row_length) == PackingStats(packed.tokens, 0, packed.padding, packed.cut)


@pytest.mark.parametrize("seed", range(5))
def test_one_stream_is_compared_as_cutting_a_stream_packs(seed: int) -> None:
    lengths, row_length = lengths_of(seed, count=50), 64
    stream = [token for document in documents_of(lengths) for token in [END_OF_TEXT_ID, *document.tolist()]]
    whole = stream[: len(stream) - len(stream) % row_length]
    kept = sum(token != END_OF_TEXT_ID for token in whole)
    assert PACKERS[STREAM](lengths, row_length)[:3] == (kept, sum(lengths) - kept, 0)


def test_every_packing_accounts_for_every_token_and_only_best_fit_pads() -> None:
    lengths = lengths_of(4, count=3000)
    for name, stats in compare_packings(lengths, 128).items():
        assert stats.kept + stats.lost == sum(lengths), name
        assert (stats.padding > 0) <= (name in (OURS, BFD_SPLIT, BFD)), name


def test_only_packings_that_split_long_documents_keep_all_tokens() -> None:
    lengths = lengths_of(4, count=300)
    lossless = {name for name, stats in compare_packings(lengths, 128).items() if stats.lost == 0}
    assert lossless - {STREAM} == {OURS, BFD_SPLIT}


def test_only_packings_that_fill_every_row_cut_documents_that_fit_one() -> None:
    stats = compare_packings([9] * 40, 16)
    assert {name for name, found in stats.items() if found.cut} == {OURS, CROPPED, STREAM}
    assert stats[OURS].lost == 0 < stats[CROPPED].lost


def test_documents_that_fill_rows_exactly_are_kept_by_every_packing() -> None:
    for name, stats in compare_packings([15] * 40, 16).items():
        assert stats == PackingStats(600, 0, 0, 0), name
