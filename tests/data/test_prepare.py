"""Prepared folders: made once, whole or continued, and refused where they do not fit."""

import hashlib
import json
import os
import resource
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from httpx2 import Request, Response
from huggingface_hub.errors import HfHubHTTPError

from fgpt_hf.config.data_options import TextSource
from fgpt_hf.config.runs import Preparation
from fgpt_hf.data import shard_writer
from fgpt_hf.data.prepare import packing_report, prepare, prepare_documents
from fgpt_hf.data.shard_records import total_size
from fgpt_hf.data.shards import load_prepared
from fgpt_hf.data.splits import TRAIN, VALIDATION
from fgpt_hf.errors import UserError
from fgpt_hf.files import read_sealed_json, write_sealed_json
from tests.support.fineweb import documents, write_shard, write_shards


@pytest.fixture
def source(tmp_path: Path) -> TextSource:
    write_shards(tmp_path / "corpus", shards=4, texts=150, row_group_size=20)
    return TextSource(
        dataset_name=str(tmp_path / "corpus" / "sample"),
        max_position_embeddings=64,
        validation_fraction=0.1,
        preprocessing_num_workers=1,
    )


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_writer, "SHARD_TOKENS", 2000)
    monkeypatch.setattr("fgpt_hf.data.stream.BLOCKS_PER_BUFFER", 2)
    monkeypatch.setattr("fgpt_hf.data.stream.BUFFER_CHARACTERS", 0)


def contents(folder: Path) -> dict[str, str]:
    """Hashes of all files by their path."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def rows(folder: Path, split: str, row_length: int = 64) -> np.ndarray:
    prepared = load_prepared(folder, row_length).rows[split]
    return prepared[list(range(len(prepared)))]


@pytest.mark.usefixtures("small_shards")
def test_rows_come_back_as_they_were_made(source: TextSource, tmp_path: Path) -> None:
    records = prepare(source, tmp_path / "rows")
    assert len(records) > 5
    for split in (TRAIN, VALIDATION):
        found = rows(tmp_path / "rows", split)
        assert found.dtype == np.uint16 and found.shape == (sum(record.sizes[split].rows for record in records), 64)
        assert sum(record.sizes[split].documents for record in records) > 30
    assert sum(record.sizes[split].documents for record in records for split in (TRAIN, VALIDATION)) == 600
    found = load_prepared(tmp_path / "rows", 64)  # type: ignore[assignment]
    first = found.rows[TRAIN]  # type: ignore[attr-defined]
    assert f"in {len(first):,} rows of 64: none lost" in str(found.manifest)  # type: ignore[attr-defined]
    assert found.manifest.sizes == total_size(records)  # type: ignore[attr-defined]
    assert np.array_equal(first[[5, 0, 5]], rows(tmp_path / "rows", TRAIN)[[5, 0, 5]])


@pytest.mark.slow
@pytest.mark.usefixtures("small_shards")
def test_a_preparation_goes_on_after_any_shard(
    source: TextSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = len(prepare(source, tmp_path / "undisturbed"))
    expected = contents(tmp_path / "undisturbed")
    write = shard_writer._write_shard
    for survivors in range(count):
        shutil.rmtree(tmp_path / "rows", ignore_errors=True)
        written = iter(range(survivors))

        def write_some(*arguments: Any, written: Any = written) -> Any:
            record = write(*arguments)
            if next(written, None) is None:
                raise KeyboardInterrupt
            return record

        monkeypatch.setattr(shard_writer, "_write_shard", write_some)
        with suppress(KeyboardInterrupt):
            prepare(source, tmp_path / "rows")
        assert len(list((tmp_path / "rows").glob("shard-*"))) == survivors
        monkeypatch.setattr(shard_writer, "_write_shard", write)
        prepare(source, tmp_path / "rows")
        assert contents(tmp_path / "rows") == expected


@pytest.mark.usefixtures("small_shards")
def test_no_space_leaves_whole_shards_that_can_be_trained_on_or_continued(source: TextSource, tmp_path: Path) -> None:
    undisturbed = prepare(source, tmp_path / "undisturbed")
    largest = max(path.stat().st_size for path in (tmp_path / "undisturbed").rglob("train.arrow"))
    folder = tmp_path / "rows"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 1, limits[1]))
    try:
        with pytest.raises(ValueError, match="free some space and run the same command again"):
            prepare(source, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with pytest.raises(ValueError, match="not finished.*--max_train_tokens"):
        load_prepared(folder, 64)
    kept = len(list(folder.glob("shard-*")))
    assert not list(folder.glob("*.partial"))
    if kept:
        tokens = sum(record.sizes[TRAIN].tokens for record in undisturbed[:kept])
        prepare(source, folder, tokens)
        assert len(rows(folder, TRAIN)) == sum(record.sizes[TRAIN].rows for record in undisturbed[:kept])
    prepare(source, folder)
    assert contents(folder) == contents(tmp_path / "undisturbed")


@pytest.mark.usefixtures("small_shards")
def test_a_part_of_the_documents_can_be_prepared_and_more_of_them_later(source: TextSource, tmp_path: Path) -> None:
    whole = prepare(source, tmp_path / "whole")
    some = prepare(source, tmp_path / "rows", 5000)
    assert 5000 <= sum(record.sizes[TRAIN].tokens for record in some) < 8000
    part = rows(tmp_path / "rows", TRAIN)
    assert np.array_equal(part, rows(tmp_path / "whole", TRAIN)[: len(part)])
    prepare(source, tmp_path / "rows")
    for split in (TRAIN, VALIDATION):
        assert np.array_equal(rows(tmp_path / "rows", split), rows(tmp_path / "whole", split))
    assert len(whole) > 2


def test_a_finished_preparation_is_not_done_again(
    source: TextSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(source, tmp_path / "rows")
    monkeypatch.delattr(shard_writer, "TokenizerPool")
    assert prepare(source, tmp_path / "rows") == first


@pytest.mark.usefixtures("small_shards")
def test_the_report_says_how_many_documents_each_split_has_and_how_they_fill_their_rows(
    source: TextSource, tmp_path: Path
) -> None:
    records = prepare(source, tmp_path / "rows")
    train, validation = packing_report(records, source.max_position_embeddings).split("\n")
    size = total_size(records)[TRAIN]
    assert train.startswith(f"train: {size.documents:,} documents, {size.tokens:,} tokens in {size.rows:,} rows of 64")
    assert validation.startswith("validation: ")
    shares = f"{size.padding / (size.rows * 64):.2%} padding, {size.cut / size.documents:.2%} of the documents cut"
    assert train.endswith(f"none lost, {shares} to fill rows")


def test_the_command_prepares_and_says_how_to_train(source: TextSource, tmp_path: Path) -> None:
    flags = {name: getattr(source, name) for name in source.__dataclass_fields__}
    output = prepare_documents(Preparation(**flags, output_dir=str(tmp_path / "rows")))
    assert output.endswith(f"train on them with --dataset_name {tmp_path / 'rows'}")


# bad input


@pytest.mark.parametrize(("name", "value"), [("validation_fraction", 0.2), ("max_position_embeddings", 32)])
def test_a_folder_of_other_rows_is_not_continued(source: TextSource, tmp_path: Path, name: str, value: Any) -> None:
    prepare(source, tmp_path / "rows")
    with pytest.raises(ValueError, match=f"holds rows prepared with .*not .*={value}: choose another output_dir"):
        prepare(replace(source, **{name: value}), tmp_path / "rows")


def test_a_folder_of_documents_that_have_changed_is_not_continued(source: TextSource, tmp_path: Path) -> None:
    prepare(source, tmp_path / "rows")
    write_shard(Path(source.dataset_name) / "10BT" / "new.parquet", documents(5, seed=99))
    with pytest.raises(ValueError, match="from before its documents changed"):
        prepare(source, tmp_path / "rows")


def test_rows_of_another_length_or_tokenizer_are_refused(source: TextSource, tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    prepare(source, folder)
    with pytest.raises(ValueError, match="rows of 64 tokens and max_position_embeddings=128: give"):
        load_prepared(folder, 128)
    recipe = read_sealed_json(folder / "prepared.json")
    write_sealed_json(folder / "prepared.json", recipe | {"tokenizer": "another"})
    with pytest.raises(ValueError, match="prepared with another tokenizer"):
        load_prepared(folder, 64)


def test_rows_that_the_hub_does_not_take_stay_in_their_folder(
    source: TextSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise HfHubHTTPError("403 Forbidden", response=Response(403, request=Request("POST", "http://127.0.0.1/")))

    monkeypatch.setattr("datasets.DatasetDict.push_to_hub", refuse)
    flags = {name: getattr(source, name) for name in source.__dataclass_fields__}
    with pytest.raises(UserError, match="tester/rows could not be written to: 403 Forbidden.* complete in .*rows"):
        prepare_documents(Preparation(**flags, output_dir=str(tmp_path / "rows"), hub_dataset_id="tester/rows"))
    assert len(rows(tmp_path / "rows", TRAIN)) > 0


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"finished": false, "format": 1}'])
def test_a_damaged_manifest_is_named(source: TextSource, tmp_path: Path, content: str) -> None:
    prepare(source, tmp_path / "rows")
    (tmp_path / "rows" / "prepared.json").write_text(content)
    with pytest.raises(UserError, match="prepared.json is damaged"):
        load_prepared(tmp_path / "rows", 64)


@pytest.mark.parametrize("content", ["{}", '{"end": null, "sizes": {}}', '{"end": {"buffer": 1}, "sizes": {}}'])
@pytest.mark.parametrize("file", ["shard-00000/shard.json", "prepared.json"])
def test_a_record_of_another_version_is_named(source: TextSource, tmp_path: Path, file: str, content: str) -> None:
    prepare(source, tmp_path / "rows")
    write_sealed_json(tmp_path / "rows" / file, json.loads(content))
    with pytest.raises(UserError, match=f"{file} is damaged, or was written by another version"):
        load_prepared(tmp_path / "rows", 64)


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("a.jsonl", b'{"text": ""}\n{"text": null}\n', "none of them holds text"),
        ("a.jsonl", b'{"other": ""}\n', "has the columns other, and none of them holds text"),
        ("a.jsonl", bytes(range(256)), "a.jsonl cannot be read"),
        ("a.txt", bytes(range(256)), "a.txt cannot be read"),
        ("a.parquet", b"PAR1", "a.parquet cannot be read"),
    ],
)
def test_a_refused_corpus_leaves_no_folder(tmp_path: Path, file: str, content: bytes, reason: str) -> None:
    (tmp_path / file).write_bytes(content)
    source = TextSource(dataset_name=str(tmp_path / file), preprocessing_num_workers=1)
    with pytest.raises(UserError, match=reason):
        prepare(source, tmp_path / "rows")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".rows.lock", file]


def test_a_folder_that_holds_something_else_is_left_alone(source: TextSource, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "run.yaml").touch()
    with pytest.raises(UserError, match="run holds other files, such as checkpoints, run.yaml: choose an empty folder"):
        prepare(source, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoints", "run.yaml"]


@pytest.mark.usefixtures("small_shards")
def test_shards_of_other_documents_without_a_manifest_are_left_alone(source: TextSource, tmp_path: Path) -> None:
    prepare(source, tmp_path / "rows")
    (tmp_path / "rows" / "prepared.json").unlink()
    before = contents(tmp_path / "rows")
    with pytest.raises(UserError, match="holds rows that were made in another way"):
        prepare(replace(source, validation_fraction=0.2), tmp_path / "rows")
    assert contents(tmp_path / "rows") == before


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system that takes no files")
@pytest.mark.timeout(120)
def test_a_folder_that_cannot_be_written_to_is_named_and_not_waited_for(source: TextSource) -> None:
    with pytest.raises(OSError, match="no file can be created there.*'/proc'"):
        prepare(source, Path("/proc/rows"))


def test_equal_documents_are_the_same_corpus_wherever_and_whenever_they_were_written(
    source: TextSource, tmp_path: Path
) -> None:
    first = prepare(source, tmp_path / "rows")
    shutil.copytree(tmp_path / "corpus", tmp_path / "moved")
    os.utime(tmp_path / "moved" / "sample" / "10BT" / "000_00000.parquet", (1, 1))
    moved = replace(source, dataset_name=str(tmp_path / "moved" / "sample"))
    assert prepare(moved, tmp_path / "rows") == first


@pytest.mark.parametrize(
    "setting", [{"validation_fraction": -1}, {"max_train_tokens": 0}, {"preprocessing_num_workers": 0}]
)
def test_amounts_that_make_no_sense_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be (above zero|zero or more)"):
        Preparation(**setting)
