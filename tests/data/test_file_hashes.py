"""The identity of a file is its content, and a large one is read once for it."""

import os
from pathlib import Path

import pytest

from fgpt_hf.data import file_hashes as module
from fgpt_hf.data.file_hashes import file_hashes
from fgpt_hf.files import sha256_of


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(module, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(module, "SMALL_BYTES", 10)
    return tmp_path / "home"


@pytest.mark.parametrize("size", [0, 9, 10, 1000])
def test_content_decides_whatever_the_size_and_the_time(tmp_path: Path, size: int) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_bytes(b"x" * size)
    second.write_bytes(b"x" * size)
    os.utime(second, (1, 1))
    assert file_hashes([first, second]) == [sha256_of(b"x" * size)] * 2
    first.write_bytes(b"x" * size + b"y")
    assert file_hashes([first]) == [sha256_of(b"x" * size + b"y")]


def test_other_content_of_the_same_size_and_time_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "a"
    for content in (b"x" * 20, b"y" * 20):
        file.write_bytes(content)
        os.utime(file, (1, 1))
        assert file_hashes([file]) == [sha256_of(content)]


def test_a_large_file_is_read_once(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"x" * 20)
    expected = file_hashes([tmp_path / "a"])
    with monkeypatch.context() as patch:
        patch.setattr(module, "sha256_of", lambda content: sha256_of(content) if isinstance(content, bytes) else None)
        assert file_hashes([tmp_path / "a"]) == expected
    (kept,) = (home / "fgpt" / "hashes").iterdir()
    kept.write_text("")  # damaged
    assert file_hashes([tmp_path / "a"]) == expected
