"""What a run writes: folders that are whole or not there, and lines that belong to a step."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
PARTIAL = ".partial"  # the ending of a folder that is being written, or replaced


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file, of which a killed process may have left the last one unfinished."""
    lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
    return [json.loads(line) for line in lines[:-1]]


@contextmanager
def atomic_directory(folder: Path) -> Iterator[Path]:
    """A new folder to write into: it becomes `folder` when the block ends well and disappears when it fails.

    It is flushed to the disk first, so a process that is killed at any moment leaves what was there before, or all of
    the new.
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
    """Record the hashes of a folder's files, for `flaw`."""
    manifest = {path.relative_to(folder).as_posix(): _sha256(path) for path in _files(folder)}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def integrity_error(folder: Path) -> str | None:
    """What is wrong with a folder that has a manifest, or None if every file is as it was written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"{MANIFEST} is missing or damaged"
    for name, digest in manifest.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if _sha256(folder / name) != digest:
            return f"{name} is damaged"
    return None


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's text, or none of it if the process is killed meanwhile."""
    partial = path.with_name(f"{path.name}{PARTIAL}")
    partial.write_text(text, encoding="utf-8")
    _flush(partial)
    partial.replace(path)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows has no such call for folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
