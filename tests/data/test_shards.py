"""Prepared rows are what was prepared, or what is wrong with them is one line, and preparing again mends it."""

import hashlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fgpt_hf.config.data_options import TextSource
from fgpt_hf.config.runs import BaseRun
from fgpt_hf.data import shards
from fgpt_hf.data.prepare import prepare
from fgpt_hf.data.pretraining import load_pretraining_data
from fgpt_hf.data.shards import PreparedRows, load_prepared
from fgpt_hf.data.splits import SPLITS, TRAIN
from fgpt_hf.errors import UserError
from fgpt_hf.workers import BackgroundCheck
from tests.support.fineweb import documents, write_shards

SHARDS = 3
FILES = ["prepared.json"] + [
    f"shard-{number:05d}/{name}"
    for number in range(SHARDS)
    for name in ("shard.json", "train.arrow", "validation.arrow")
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> TextSource:
    folder = tmp_path_factory.mktemp("corpus")
    write_shards(folder, shards=2, texts=70, row_group_size=20)
    return TextSource(
        dataset_name=str(folder / "sample"),
        max_position_embeddings=64,
        validation_fraction=0.5,
        preprocessing_num_workers=1,
    )


@pytest.fixture(autouse=True)
def small_shards() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fgpt_hf.data.shard_writer.SHARD_TOKENS", 2000)
        patch.setattr("fgpt_hf.data.stream.BLOCKS_PER_BUFFER", 2)
        patch.setattr("fgpt_hf.data.stream.BUFFER_CHARACTERS", 0)
        yield


@pytest.fixture(scope="module")
def prepared(source: TextSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fgpt_hf.data.shard_writer.SHARD_TOKENS", 2000)
        patch.setattr("fgpt_hf.data.stream.BLOCKS_PER_BUFFER", 2)
        patch.setattr("fgpt_hf.data.stream.BUFFER_CHARACTERS", 0)
        folder = tmp_path_factory.mktemp("prepared") / "rows"
        assert len(prepare(source, folder)) == SHARDS
        return folder


@pytest.fixture
def folder(prepared: Path, tmp_path: Path) -> Path:
    return shutil.copytree(prepared, tmp_path / "rows")


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def flip(position: float) -> Callable[[Path], None]:
    """Change one bit at a fraction of a file's length."""

    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[int(position * (len(content) - 1))] ^= 1
        path.write_bytes(content)

    return damage


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def exchange(path: Path, other: Path) -> None:
    path.rename(path.with_name("aside"))
    other.rename(path)
    path.with_name("aside").rename(other)


def exchange_with_another_file(path: Path) -> None:
    """Exchange a file with that of the next shard, or the manifest with a shard's record."""
    folder = path.parent
    other = folder / "shard-00000" / "shard.json"
    if path.name != "prepared.json":
        number = (int(folder.name[-5:]) + 1) % SHARDS
        other = folder.parent / f"shard-{number:05d}" / path.name
    exchange(path, other)


DAMAGES = {
    **{f"flip at {position}": flip(position) for position in (0, 0.03, 0.3, 0.6, 0.97, 1)},
    "truncate": truncate,
    "empty": empty,
    "append": append,
    "delete": Path.unlink,
    "replace by folder": replace_by_folder,
    "exchange": exchange_with_another_file,
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_file_is_named(folder: Path, file: str, damage: Callable[[Path], None]) -> None:
    damage(folder / file)
    with pytest.raises((UserError, OSError)) as raised:
        load_prepared(folder, 64)
    message = str(raised.value)
    assert str(folder) in message and "\n" not in message
    if damage is not exchange_with_another_file:
        assert file in message


@pytest.mark.parametrize("number", range(SHARDS))
def test_a_whole_shard_that_is_missing_or_another_is_named(folder: Path, number: int) -> None:
    shard, other = (folder / f"shard-{n:05d}" for n in (number, (number + 1) % SHARDS))
    exchange(shard, other)
    with pytest.raises(UserError, match="shard-0000. does not begin where the shard before it ends"):
        load_prepared(folder, 64)
    exchange(shard, other)
    load_prepared(folder, 64)
    shutil.rmtree(shard)
    with pytest.raises(UserError, match=f"lacks {shard.name} or a later shard: run `fgpt prepare` again"):
        load_prepared(folder, 64)
    shard.write_text("a file")
    with pytest.raises(UserError, match=rf"{shard.name}/shard.json is missing"):
        load_prepared(folder, 64)


@pytest.mark.parametrize("shard", range(SHARDS))
def test_training_and_validation_rows_that_were_exchanged_are_named(folder: Path, shard: int) -> None:
    exchange(*(folder / f"shard-{shard:05d}" / f"{split}.arrow" for split in SPLITS))
    with pytest.raises(UserError, match=f"shard-{shard:05d}/train.arrow is damaged"):
        load_prepared(folder, 64)


def test_a_shard_of_other_documents_is_named(folder: Path, source: TextSource, tmp_path: Path) -> None:
    prepare(replace(source, validation_fraction=0.4), tmp_path / "other")
    shutil.rmtree(folder / "shard-00000")
    (tmp_path / "other" / "shard-00000").rename(folder / "shard-00000")
    with pytest.raises(UserError, match="shard-00000 holds rows of other documents, or rows made in another way"):
        load_prepared(folder, 64)


@pytest.mark.parametrize("file", [FILES[0], *FILES[4:7]])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_preparing_again_mends_what_is_damaged_and_keeps_what_is_not(
    prepared: Path, folder: Path, source: TextSource, file: str, damage: Callable[[Path], None]
) -> None:
    if file == "prepared.json" and damage is replace_by_folder:
        pytest.skip("it is named: see above")
    kept = (folder / "shard-00002" / "train.arrow").stat().st_mtime_ns
    damage(folder / file)
    prepare(source, folder)
    assert contents(folder) == contents(prepared)
    if damage is not exchange_with_another_file:
        assert (folder / "shard-00002" / "train.arrow").stat().st_mtime_ns == kept


def test_rows_without_any_record_are_not_taken_for_documents(folder: Path, source: TextSource) -> None:
    for record in (folder / "prepared.json", *folder.glob("shard-*/shard.json")):
        record.unlink()
        with pytest.raises(UserError, match=f"{folder}/prepared.json is missing: run `fgpt prepare` again"):
            load_pretraining_data(BaseRun(dataset_name=str(folder), max_position_embeddings=64))


# what is checked while rows are already being read


def test_without_a_check_only_content_is_not_looked_at(folder: Path) -> None:
    flip(0.9)(folder / "shard-00001" / "train.arrow")
    load_prepared(folder, 64, verify=False)
    truncate(folder / "shard-00001" / "train.arrow")
    with pytest.raises(UserError, match="train.arrow is damaged: it has"):
        load_prepared(folder, 64, verify=False)


def test_a_check_that_takes_long_stops_the_reading_of_rows_when_it_finds_something(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SECONDS_TO_CHECK", 0.0)
    started: list[BackgroundCheck] = []

    def start(check: Callable[[], object]) -> BackgroundCheck:
        started.append(BackgroundCheck(check))
        return started[0]

    monkeypatch.setattr(shards, "BackgroundCheck", start)
    flip(0.9)(folder / "shard-00002" / "validation.arrow")
    try:
        rows = load_prepared(folder, 64).rows[TRAIN]
        with pytest.raises(UserError, match="shard-00002/validation.arrow is damaged"):
            started[0].wait(seconds=10)
    except UserError:  # it was faster
        return
    with pytest.raises(UserError, match="shard-00002/validation.arrow is damaged"):
        rows[[0]]


def test_rows_of_a_folder_have_the_fingerprint_of_their_content(
    prepared: Path, source: TextSource, tmp_path: Path
) -> None:
    def fingerprint(folder: Path) -> str:
        rows = load_prepared(folder, 64).rows[TRAIN]
        assert isinstance(rows, PreparedRows) and rows[[0]].dtype == np.uint16
        return rows.fingerprint

    prepare(source, tmp_path / "again")
    assert fingerprint(tmp_path / "again") == fingerprint(prepared)
    texts = documents(70)
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(texts))
    (tmp_path / "b.txt").write_text("\n<|endoftext|>\n".join([*texts[:-1], texts[-1].upper()]))
    for name in ("a", "b"):
        prepare(replace(source, dataset_name=str(tmp_path / f"{name}.txt")), tmp_path / name)
    assert fingerprint(tmp_path / "a") != fingerprint(tmp_path / "b")
