"""Files and folders that are complete or absent, whenever the process that writes them is killed.

New content is written next to its target, to a name that ends in `.partial`, flushed to the disk, and renamed. A reader
sees the old content or the new one, and nothing in between. Writing costs one flush per file. A log that gains a line
a second is appended to instead, and `read_json_lines` ignores a last line that was cut. Every file gets the permissions
of the umask, whichever library wrote it.
"""

import hashlib
import json
import logging
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from filelock import FileLock

from fgpt_hf.errors import UserError

logger = logging.getLogger(__name__)

Number = TypeVar("Number", bound=np.generic)

MANIFEST = "manifest.json"
PARTIAL = ".partial"  # the ending of a file or folder that is being written, or replaced
SEAL = "sha256"  # the last key of a sealed JSON file


@contextmanager
def locked(path: Path, timeout: float = -1) -> Iterator[None]:
    """Hold a lock file, which is created if need be, with its folder; several processes hold it one at a time.

    Args:
        timeout: seconds to wait, or -1 to wait as long as it takes.

    Raises:
        OSError: no file can be created in that folder.
        filelock.Timeout: another process still holds the lock.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=path.parent):
            pass  # FileLock waits forever where no file can be created, such as in /proc
    except OSError as error:
        reason = f"no file can be created there ({error.strerror})"
        raise OSError(error.errno, reason, str(path.parent)) from error
    with FileLock(path, timeout=timeout):
        yield


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
        partial.write_bytes(b"")
        mode = stat.S_IMODE(partial.stat().st_mode)
        yield partial
        _set_mode(partial, mode)
        _flush(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file's content; if the process is killed while it writes, the file keeps its old content.

    Example:
        >>> from tempfile import mkdtemp
        >>> write_atomically(Path(mkdtemp(), "run.yaml"), "seed: 1")
    """
    with atomic_file(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def refuse_existing(path: Path) -> None:
    """Raise UserError if there is a file of this name, or a folder that is not empty."""
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise UserError(f"{path} already exists: choose another name, or delete it")


@contextmanager
def atomic_directory(folder: Path) -> Iterator[Path]:
    """Yield a new folder to write into; it replaces `folder` when the block succeeds and is deleted when it fails.

    Example:
        >>> from tempfile import mkdtemp
        >>> with atomic_directory(Path(mkdtemp(), "model")) as partial:
        ...     _ = (partial / "config.json").write_text("{}")
    """
    partial, replaced = (folder.with_name(f"{folder.name}{mark}{PARTIAL}") for mark in ("", ".replaced"))
    remove(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        apply_umask(partial)
        for path in (*_files(partial), *filter(Path.is_dir, partial.rglob("*")), partial):
            _flush(path)
    except BaseException:
        remove(partial)
        raise
    if folder.exists():
        remove(replaced)
        folder.rename(replaced)
    partial.rename(folder)
    _flush(folder.parent)
    remove(replaced)


def remove(path: Path) -> None:
    """Delete a file, or a folder with all that is in it, as far as that can be deleted; do nothing if it is not there.

    Example:
        >>> from tempfile import mkdtemp
        >>> folder = Path(mkdtemp())
        >>> remove(folder)
        >>> folder.exists()
        False
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def apply_umask(folder: Path) -> None:
    """Give a folder's files and folders the permissions of the folder itself, and files no right to be executed.

    Temporary files, which safetensors and others write and rename, can be read by their owner alone.
    """
    mode = stat.S_IMODE(folder.stat().st_mode) & 0o777
    for path in folder.rglob("*"):
        if not path.is_symlink():
            _set_mode(path, mode if path.is_dir() else mode & 0o666)


def write_manifest(folder: Path) -> None:
    """Record the hashes of a folder's files in `manifest.json`, for `integrity_error`."""
    manifest = {path.relative_to(folder).as_posix(): sha256_of(path) for path in _files(folder)}
    write_sealed_json(folder / MANIFEST, manifest)


def integrity_error(folder: Path) -> str | None:
    """Return what is wrong with a folder that has a manifest, or None if every file has its recorded hash."""
    try:
        manifest = read_sealed_json(folder / MANIFEST)
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


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder."""
    return path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in _files(path))


def cached_array(path: Path, compute: Callable[[], npt.NDArray[Number]]) -> npt.NDArray[Number]:
    """Return the array in a cache file, which is computed and written if there is none, or if it is damaged.

    Example:
        >>> from tempfile import mkdtemp
        >>> path = Path(mkdtemp(), "rows.array")
        >>> cached_array(path, lambda: np.arange(3))
        array([0, 1, 2])
        >>> cached_array(path, lambda: np.arange(9))
        array([0, 1, 2])
    """
    array: npt.NDArray[Number] | None = read_cached_array(path)
    if array is None:
        array = compute()
        write_cached_array(path, array)
    return array


def read_cached_array(path: Path) -> npt.NDArray[Any] | None:
    """Return the array that `write_cached_array` wrote, or None if there is none, or if a byte of it has changed."""
    if not path.exists():
        return None
    digest, _, content = path.read_bytes().partition(b"\n")
    if digest.decode(errors="replace") != sha256_of(content):
        logger.warning("%s is damaged, so it is rebuilt", path)
        return None
    array: npt.NDArray[Any] = np.load(BytesIO(content))
    return array


def write_cached_array(path: Path, array: npt.NDArray[Any]) -> None:
    """Write an array after its hash, and create its folder if needed."""
    file = BytesIO()
    np.save(file, array)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, f"{sha256_of(file.getvalue())}\n".encode() + file.getvalue())


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        UserError: the file is not JSON, or holds something other than an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8, or nested without end
        raise UserError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it should hold a JSON object")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically, and create its folder if needed.

    Example:
        >>> from tempfile import mkdtemp
        >>> path = Path(mkdtemp(), "results", "step_10.json")
        >>> write_json(path, {"acc": 0.25})
        >>> read_json(path)
        {'acc': 0.25}
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(content, indent=1))


def write_sealed_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file that ends with a hash of itself, so that `read_sealed_json` notices any change.

    Example:
        >>> from tempfile import mkdtemp
        >>> path = Path(mkdtemp(), "shard.json")
        >>> write_sealed_json(path, {"rows": 7})
        >>> read_sealed_json(path)
        {'rows': 7}
        >>> _ = path.write_text(path.read_text().replace("7", "8"))
        >>> read_sealed_json(path)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        fgpt_hf.errors.UserError: ...shard.json is damaged: its content does not have the hash that it names
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, sealed_json(content))


def sealed_json(content: Mapping[str, Any]) -> str:
    """Return the text of a JSON file that ends with a hash of itself."""
    return json.dumps({**content, SEAL: sha256_of(json.dumps(content).encode())}, indent=1)


def read_sealed_json(path: Path) -> dict[str, Any]:
    """Return the object in a file that `write_sealed_json` wrote.

    Raises:
        UserError: a byte of it has changed since.
    """
    content = read_json(path)
    content.pop(SEAL, None)
    if path.read_bytes() != sealed_json(content).encode():
        raise UserError(f"{path} is damaged: its content does not have the hash that it names")
    return content


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects in a file of JSON lines; none if there is no such file.

    A last line without its line end was cut when its writer was killed, and is ignored.

    Raises:
        UserError: another line is not JSON, or holds something other than an object.
    """
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    objects = []
    for number, line in enumerate(lines, start=1):
        try:
            objects.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is damaged: line {number} is not JSON ({error})") from error
        if not isinstance(objects[-1], dict):
            raise UserError(f"{path} is damaged: line {number} should hold a JSON object")
    return objects


def write_json_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Replace a file of JSON lines atomically."""
    write_atomically(path, json_lines(lines))


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
        file.write(json_lines([line]))


def json_lines(lines: Iterable[Mapping[str, Any]]) -> str:
    """Return the text of a file of JSON lines.

    Example:
        >>> json_lines([{"step": 1}, {"step": 2}])
        '{"step": 1}\\n{"step": 2}\\n'
    """
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _set_mode(path: Path, mode: int) -> None:
    if stat.S_IMODE(path.stat().st_mode) != mode:
        with suppress(PermissionError):  # of file systems that have no permissions
            path.chmod(mode)


def _flush(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot flush folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
