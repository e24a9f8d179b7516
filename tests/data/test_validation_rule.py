"""A held-out set exists wherever two documents do, or one that can be divided; its size is the fraction, not luck."""

import json
import random
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fgpt_hf.config.data_options import TextSource
from fgpt_hf.config.runs import BaseRun
from fgpt_hf.data import validation_rule as validation_rules
from fgpt_hf.data.corpora import ParquetShard, open_corpus
from fgpt_hf.data.pretraining import load_pretraining_data
from fgpt_hf.data.splits import (
    TRAIN,
    VALIDATION,
    ValidationRule,
    document_hash,
    is_validation,
    validation_threshold,
)
from fgpt_hf.data.validation_rule import lone_document_cut, validation_rule
from fgpt_hf.tokenizer.tokenizer import PAD_ID, build_tokenizer

pytestmark = pytest.mark.usefixtures("own_cache")


def write(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def held_out(source: TextSource, texts: list[str]) -> set[str]:
    rule = validation_rule(source, open_corpus(source))
    return {part for text in texts for split, part in rule.divide(text) if split == VALIDATION}


@given(st.lists(st.floats(0, 1, exclude_max=True), max_size=300), st.floats(0, 0.999))
def test_the_threshold_holds_out_the_fraction_at_least_one_and_leaves_one(hashes: list[float], fraction: float) -> None:
    distinct = set(hashes)
    below = sum(value < validation_threshold(hashes, fraction) for value in distinct)
    if len(distinct) > 1 and fraction > 0:
        assert below == min(max(1, round(fraction * len(distinct))), len(distinct) - 1)
    elif fraction == 0:
        assert below == 0


@given(st.lists(st.floats(0, 1, exclude_max=True), min_size=2), st.floats(0.001, 0.999), st.floats(0.001, 0.999))
def test_a_larger_fraction_keeps_what_a_smaller_one_holds_out(hashes: list[float], one: float, other: float) -> None:
    if len(set(hashes)) > 1:
        assert validation_threshold(hashes, min(one, other)) <= validation_threshold(hashes, max(one, other))


@pytest.mark.parametrize(("count", "expected"), [(2, 1), (20, 1), (42, 2), (60, 3), (1000, 50)])
def test_documents_of_ones_own_are_held_out_by_the_fraction_wherever_they_lie(
    tmp_path: Path, count: int, expected: int
) -> None:
    texts = [f"the document number {number}" for number in range(count)]
    source = TextSource(dataset_name=write(tmp_path / "one.jsonl", texts), validation_fraction=0.05)
    found = held_out(source, texts)
    assert len(found) == expected
    assert found == set(sorted(texts, key=document_hash)[:expected])
    shuffled = random.Random(0).sample(texts, count)
    folder = tmp_path / "several"
    folder.mkdir()
    for number in range(3):
        write(folder / f"{number}.jsonl", [*shuffled[number::3], texts[0]])  # and one that is there several times
    assert held_out(replace(source, dataset_name=str(folder)), texts) == found


def test_a_lone_document_is_divided_at_a_paragraphs_end(tmp_path: Path) -> None:
    novel = "\n\n".join(f"Chapter {number}. " + "It was a dark and stormy night. " * 20 for number in range(100))
    source = TextSource(dataset_name=write(tmp_path / "novel.jsonl", [novel]), max_position_embeddings=128)
    rule = validation_rule(source, open_corpus(source))
    (train, beginning), (validation, end) = rule.divide(novel)
    assert (train, validation) == (TRAIN, VALIDATION)
    assert beginning + end == novel
    assert end.startswith("Chapter ")
    tokens = [len(ids) for ids in build_tokenizer()([beginning, end]).input_ids]
    assert 127 <= tokens[1] <= 0.03 * sum(tokens)


@given(st.text(min_size=2, max_size=400), st.floats(0.001, 0.999), st.integers(2, 64))
def test_both_parts_of_a_lone_document_hold_something(text: str, fraction: float, row_length: int) -> None:
    assert 0 < lone_document_cut(text, fraction, row_length) < len(text)


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("count", [1, 2, 20])
def test_every_corpus_of_ones_own_trains_and_is_measured_in_both_modes(
    tmp_path: Path, count: int, streaming: bool
) -> None:
    texts = [" ".join(f"{number * 1000 + word}" for word in range(300)) for number in range(count)]
    run = BaseRun(
        dataset_name=write(tmp_path / "few.jsonl", texts), max_position_embeddings=32, preprocessing_num_workers=1
    )
    data = load_pretraining_data(replace(run, streaming=streaming))
    assert len(data.validation) >= 1
    rows = data.batches(0, 1).take(50)["input_ids"].numpy()
    trained = {tuple(row) for row in rows.tolist()}
    assert (rows != PAD_ID).mean() > 0.8
    assert count == 1 or not trained & {tuple(row) for row in data.validation.tolist()}


@pytest.mark.parametrize("streaming", [True, False])
def test_a_fraction_of_zero_trains_on_every_document_and_says_so(tmp_path: Path, streaming: bool) -> None:
    texts = [f"word{number}" for number in range(40)]
    run = BaseRun(
        dataset_name=write(tmp_path / "few.jsonl", texts),
        max_position_embeddings=256,
        preprocessing_num_workers=1,
        validation_fraction=0,
        streaming=streaming,
    )
    data = load_pretraining_data(run)
    assert data.validation.shape == (0, 256)
    assert "holds nothing out" in data.description
    trained = build_tokenizer().decode(data.batches(0, 1).take(2)["input_ids"].numpy().flatten().tolist())
    assert all(text in trained for text in texts)


def test_embedded_documents_are_held_out_by_their_hash_alone() -> None:
    """The same ones as in the conversations and pairs that are made of them."""
    source = TextSource(dataset_name="pydocs", validation_fraction=0.02)
    assert validation_rule(source, open_corpus(source)) == ValidationRule(0.02)


def test_validation_rows_of_a_stream_are_those_of_the_prepared_rows(tmp_path: Path) -> None:
    texts = [f"{number} " + "once upon a time. " * (number % 9 + 1) for number in range(50)]
    run = BaseRun(
        dataset_name=write(tmp_path / "few.jsonl", texts), max_position_embeddings=16, preprocessing_num_workers=1
    )
    prepared, streamed = (load_pretraining_data(replace(run, streaming=mode)).validation for mode in (False, True))
    assert np.array_equal(prepared, streamed)


def test_a_small_data_set_elsewhere_is_read_for_the_rule_and_a_large_one_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts = [f"the document number {number}" for number in range(30)]
    url = "memory://lines/train.parquet"
    with fsspec.open(url, "wb") as file:
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), file)
    source = TextSource(dataset_name="somebody/lines", validation_fraction=0.01)
    shards = [ParquetShard(url, None, "version")]
    assert not any(is_validation(text, 0.01) for text in texts)
    rule = validation_rule(source, shards)
    assert [text for text in texts if rule.divide(text)[0][0] == VALIDATION] == [min(texts, key=document_hash)]
    monkeypatch.setattr(validation_rules, "MAX_REMOTE_BYTES", 100)
    assert validation_rule(source, shards) == ValidationRule(0.01)
