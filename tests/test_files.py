"""Files and folders are complete or absent, whatever happens while they are written."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp, mkstemp

import numpy as np
import pytest
from filelock import Timeout

from fgpt_hf.errors import UserError
from fgpt_hf.files import (
    append_json_line,
    atomic_directory,
    atomic_file,
    cached_array,
    integrity_error,
    locked,
    read_cached_array,
    read_json,
    read_json_lines,
    read_sealed_json,
    sha256_of,
    write_atomically,
    write_cached_array,
    write_json,
    write_json_lines,
    write_manifest,
    write_sealed_json,
)

FAILURES = [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()]


def write(folder: Path, content: str = "new") -> None:
    with atomic_directory(folder) as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "file").write_text(content)
        write_manifest(partial)


# files


@pytest.mark.parametrize("content", ["new ü", b"new"])
def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path: Path, content: str | bytes) -> None:
    (tmp_path / "file").write_text("old")
    write_atomically(tmp_path / "file", content)
    assert (tmp_path / "file").read_bytes() == (content if isinstance(content, bytes) else content.encode())
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("error", FAILURES)
def test_a_file_whose_writing_fails_keeps_its_content(tmp_path: Path, error: BaseException) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(type(error)), atomic_file(tmp_path / "file") as partial:
        partial.write_text("new")
        raise error
    assert (tmp_path / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_files_and_bytes_with_one_content_have_one_hash(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 3_000_000)
    assert sha256_of(tmp_path / "file") == sha256_of(b"x" * 3_000_000)
    assert sha256_of(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# folders


def test_a_folder_appears_whole_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    write(tmp_path / "folder")
    assert integrity_error(tmp_path / "folder") is None
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("error", FAILURES)
def test_a_folder_whose_writing_fails_keeps_its_content(tmp_path: Path, error: BaseException) -> None:
    write(tmp_path / "folder", "old")
    with pytest.raises(type(error)), atomic_directory(tmp_path / "folder") as partial:
        (partial / "file").write_text("new")
        raise error
    assert (tmp_path / "folder" / "inner" / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    write(tmp_path / "folder", "old")
    write(tmp_path / "folder", "new")
    assert (tmp_path / "folder" / "inner" / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize(
    ("damage", "answer"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing or damaged"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json is missing or damaged"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "manifest.json is missing or damaged"),
        (lambda folder: (folder / "manifest.json").write_text("{}"), "manifest.json is missing or damaged"),
        (lambda folder: (folder / "inner" / "file").unlink(), "inner/file is missing"),
        (lambda folder: (folder / "inner" / "file").write_text("nev"), "inner/file is damaged"),
    ],
)
def test_every_damage_is_named(tmp_path: Path, damage: Callable[[Path], object], answer: str) -> None:
    write(tmp_path / "folder")
    damage(tmp_path / "folder")
    assert integrity_error(tmp_path / "folder") == answer


@pytest.mark.parametrize(("mask", "file_mode", "folder_mode"), [(0o022, 0o644, 0o755), (0o027, 0o640, 0o750)])
def test_files_and_folders_have_the_permissions_that_the_umask_says(
    tmp_path: Path, mask: int, file_mode: int, folder_mode: int
) -> None:
    before = os.umask(mask)
    try:
        with atomic_directory(tmp_path / "model") as partial:
            descriptor, name = mkstemp(dir=partial)  # as safetensors does: for the owner alone
            os.close(descriptor)
            Path(name).rename(partial / "model.safetensors")
            Path(mkdtemp(dir=partial)).rename(partial / "inner")
            (partial / "inner" / "file").touch(0o600)
        with atomic_file(tmp_path / "file") as partial:
            partial.unlink()
            partial.touch(0o600)
        write_cached_array(tmp_path / "array", np.arange(3))
    finally:
        os.umask(before)
    modes = {path.relative_to(tmp_path).as_posix(): path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    folders, files = {"model", "model/inner"}, {"model/model.safetensors", "model/inner/file", "file", "array"}
    assert modes == {**dict.fromkeys(folders, folder_mode), **dict.fromkeys(files, file_mode)}


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_folder_takes_the_place_of_whatever_was_there(tmp_path: Path, kind: str) -> None:
    for name in ("folder", "folder.partial", "folder.replaced.partial"):
        (tmp_path / name).touch() if kind == "file" else (tmp_path / name).mkdir()
    write(tmp_path / "folder")
    assert integrity_error(tmp_path / "folder") is None
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


# locks


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system that takes no files")
@pytest.mark.timeout(120)
def test_a_lock_that_cannot_be_created_is_an_error_and_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (Path("/proc"), Path("/proc/self/new"), tmp_path / "file"):
        with pytest.raises(OSError, match="no file can be created there") as raised, locked(folder / "x.lock"):
            pass
        assert raised.value.filename == str(folder) and raised.value.errno


def test_a_lock_is_for_one_at_a_time(tmp_path: Path) -> None:
    with locked(tmp_path / "new" / "x.lock"), pytest.raises(Timeout), locked(tmp_path / "new" / "x.lock", timeout=0):
        pass
    with locked(tmp_path / "new" / "x.lock", timeout=0):
        pass


# cached arrays


@pytest.mark.parametrize("length", [0, 1, 64, 65, 70, 150])
def test_a_damaged_cached_array_is_computed_again(tmp_path: Path, length: int) -> None:
    path = tmp_path / "rows.array"
    array = np.arange(12, dtype=np.uint16).reshape(3, 4)
    write_cached_array(path, array)
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[length] ^= 1
    for damaged in (content[:length], bytes(flipped), content + b"x"):
        path.write_bytes(damaged)
        assert read_cached_array(path) is None
        assert np.array_equal(cached_array(path, lambda: array), array)
        assert path.read_bytes() == content


# JSON


def test_any_change_of_a_sealed_file_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    content = {"name": "ü", "numbers": [1, 2.5e-7, None], "inner": {"yes": True}}
    write_sealed_json(path, content)
    assert read_sealed_json(path) == content
    sealed = path.read_bytes()
    changed = [bytes([*sealed[:n], byte ^ 1, *sealed[n + 1 :]]) for n, byte in enumerate(sealed)]
    changed += [sealed[:length] for length in range(len(sealed))]
    for damaged in (*changed, sealed + b" ", json.dumps(content).encode(), b"{}"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"file\.json is damaged"):
            read_sealed_json(path)


def test_json_comes_back_as_it_was_written(tmp_path: Path) -> None:
    content = {"name": "ü", "numbers": [1, 2.5, None], "inner": {"yes": True}}
    write_json(tmp_path / "new folder" / "file.json", content)
    assert read_json(tmp_path / "new folder" / "file.json") == content


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"a": "\xff"}'])
def test_a_damaged_json_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file.json").write_bytes(content)
    with pytest.raises(ValueError, match="file.json is damaged"):
        read_json(tmp_path / "file.json")


def test_json_lines_are_written_appended_and_read(tmp_path: Path) -> None:
    lines = [{"step": 1, "text": "ü\u2028"}, {"step": 2}]
    write_json_lines(tmp_path / "lines.jsonl", lines)
    append_json_line(tmp_path / "lines.jsonl", {"step": 3})
    assert read_json_lines(tmp_path / "lines.jsonl") == [*lines, {"step": 3}]
    assert [json.loads(line)["step"] for line in (tmp_path / "lines.jsonl").read_bytes().splitlines()] == [1, 2, 3]


def test_an_unfinished_last_line_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "lines.jsonl").write_bytes('{"step": 1}\n{"step": 2}\n{"text": "ü'.encode()[:-1])
    assert read_json_lines(tmp_path / "lines.jsonl") == [{"step": 1}, {"step": 2}]
    assert read_json_lines(tmp_path / "nowhere.jsonl") == []


def test_a_line_cut_at_any_byte_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    append_json_line(path, {"text": 'aé€🜂 \\ "quoted"'})
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole + whole[:cut])
        assert len(read_json_lines(path)) == 1


def test_a_line_that_is_no_object_is_named(tmp_path: Path) -> None:
    (tmp_path / "lines.jsonl").write_text('{"step": 1}\n5\n')
    with pytest.raises(UserError, match=r"lines\.jsonl is damaged: line 2 should hold a JSON object"):
        read_json_lines(tmp_path / "lines.jsonl")


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "lines.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"lines\.jsonl is damaged: line 2 is not JSON"):
        read_json_lines(tmp_path / "lines.jsonl")
