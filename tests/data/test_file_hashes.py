"""The identity of a file is its content, and a large one is read once for it."""

import os
from pathlib import Path

import pytest

from fgpt_hf.data import file_hashes as module
from fgpt_hf.data.file_hashes import file_hashes, file_identities
from fgpt_hf.errors import UserError
from fgpt_hf.files import sha256_of
from tests.support.loopback_hub import LoopbackHub


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


def url(server: LoopbackHub, path: str) -> str:
    return f"hf://datasets/somebody/lines@{server.repo('dataset', 'somebody/lines').at('main').oid}/{path}"


def test_a_file_on_the_hub_is_its_content_whatever_else_is_committed(
    server: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PATHS_PER_REQUEST", 2)
    names = ("a.jsonl", "b.parquet", "c d.jsonl")
    server.add_repo("dataset", "somebody/lines", {name: name for name in names})
    first = file_identities([url(server, name) for name in names])
    assert len(set(first)) == 3
    server.repo("dataset", "somebody/lines").add({"README.md": "a card", "a.jsonl": "a.jsonl changed"})
    second = file_identities([url(server, name) for name in names])
    assert second[1:] == first[1:] and second[0] != first[0]
    (tmp_path / "local.parquet").write_text("b.parquet")  # a copy on this machine is the same file
    others = [str(tmp_path / "local.parquet"), "https://example.org/a.jsonl"]
    assert file_identities(others) == [first[1], "https://example.org/a.jsonl"]


def test_a_hub_that_does_not_answer_is_said(server: LoopbackHub) -> None:
    server.add_repo("dataset", "somebody/lines", {"a.jsonl": "a"})
    server.fail("POST", "/paths-info/", status=503, times=99)
    with pytest.raises(UserError, match="somebody/lines cannot be read"):
        file_identities([url(server, "a.jsonl")])
