"""Files and folders that are complete or absent, whenever the process that writes them is killed.

New content is written beside its target under a name that ends in `.partial`, flushed to the disk, and renamed. So a
reader sees the old content or the new one, and nothing between. Writing costs one flush a file. A log that gains a line
a second is appended to instead, and `read_json_lines` ignores a last line that was cut.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fgpt_hf.errors import UserError

MANIFEST = "manifest.json"
PARTIAL = ".partial"  # the ending of a file or folder that is being written, or replaced


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a path to write to; the file there replaces `path` when the block succeeds and is deleted when it fails.

    The folder must exist.

    Example:
        >>> from tempfile import mkdtemp
        >>> target = Path(mkdtemp(), "rows.bin")
        >>> with atomic_file(target) as partial:
        ...     _ = partial.write_bytes(b"123")
        >>> target.read_bytes()
        b'123'
    """
    partial = path.with_name(f"{path.name}{PARTIAL}")
    try:
        yield partial
        _flush(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file's content; if the process is killed meanwhile, the file keeps its old content.

    Example:
        >>> from tempfile import mkdtemp
        >>> write_atomically(Path(mkdtemp(), "run.yaml"), "seed: 1")
    """
    with atomic_file(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic_directory(folder: Path) -> Iterator[Path]:
    """Yield a new folder to write into; it replaces `folder` when the block succeeds and is deleted when it fails.

    Example:
        >>> from tempfile import mkdtemp
        >>> with atomic_directory(Path(mkdtemp(), "model")) as partial:
        ...     _ = (partial / "config.json").write_text("{}")
    """
    partial, replaced = (folder.with_name(f"{folder.name}{mark}{PARTIAL}") for mark in ("", ".replaced"))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in (*_files(partial), *filter(Path.is_dir, partial.rglob("*")), partial):
            _flush(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if folder.exists():
        folder.rename(replaced)
    partial.rename(folder)
    _flush(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def write_manifest(folder: Path) -> None:
    """Record the hashes of a folder's files in `manifest.json`, for `integrity_error`."""
    manifest = {path.relative_to(folder).as_posix(): sha256_of(path) for path in _files(folder)}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def integrity_error(folder: Path) -> str | None:
    """Return what is wrong with a folder that has a manifest, or None if every file has its recorded hash."""
    try:
        manifest = read_json(folder / MANIFEST)
    except (OSError, ValueError):
        return f"{MANIFEST} is missing or damaged"
    for name, digest in manifest.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if sha256_of(folder / name) != digest:
            return f"{name} is damaged"
    return None


def sha256_of(content: Path | bytes) -> str:
    """Return the SHA-256 of a file or of bytes, in hexadecimal.

    Example:
        >>> sha256_of(b"")[:8]
        'e3b0c442'
    """
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with content.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        UserError: the file is not JSON, or holds something other than an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise UserError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it should hold a JSON object")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically, and the folder that holds it if need be.

    Example:
        >>> from tempfile import mkdtemp
        >>> path = Path(mkdtemp(), "results", "step_10.json")
        >>> write_json(path, {"acc": 0.25})
        >>> read_json(path)
        {'acc': 0.25}
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(content, indent=1))


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects in a file of JSON lines; none if there is no such file.

    A last line without its line end was cut when its writer was killed, and is ignored.

    Raises:
        UserError: another line is not JSON.
    """
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    objects = []
    for number, line in enumerate(lines, start=1):
        try:
            objects.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"{path} is damaged: line {number} is not JSON ({error})") from error
    return objects


def write_json_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Replace a file of JSON lines atomically."""
    write_atomically(path, "".join(map(_json_line, lines)))


def append_json_line(path: Path, line: Mapping[str, Any]) -> None:
    """Add one object to the end of a file of JSON lines.

    Example:
        >>> from tempfile import mkdtemp
        >>> path = Path(mkdtemp(), "metrics.jsonl")
        >>> append_json_line(path, {"step": 1, "loss": 10.8})
        >>> read_json_lines(path)
        [{'step': 1, 'loss': 10.8}]
    """
    with path.open("a", encoding="utf-8") as file:
        file.write(_json_line(line))


def _json_line(line: Mapping[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False) + "\n"


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _flush(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot flush folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
