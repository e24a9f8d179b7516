"""Find the files that a path, a folder or a glob on this machine stands for.

Every file of a folder counts, however deep it lies and whatever its name, if its ending is that of a known format.
Hidden files and unknown endings are left out, by name.
"""

import glob
import logging
import os
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

from fgpt_hf.errors import UserError
from fgpt_hf.files import sha256_of
from fgpt_hf.wording import some_of

logger = logging.getLogger(__name__)

TEXT, HTML, PDF, JSON, CSV, PARQUET, ARROW = "text", "html", "pdf", "json", "csv", "parquet", "arrow"
FORMATS: Mapping[str, str] = {
    **dict.fromkeys((".txt", ".text", ".md", ".markdown", ".rst"), TEXT),
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), JSON),
    **dict.fromkeys((".csv", ".tsv"), CSV),
    **dict.fromkeys((".html", ".htm", ".xhtml"), HTML),
    **{".parquet": PARQUET, ".arrow": ARROW, ".pdf": PDF},
}
ONE_DOCUMENT_A_FILE = {TEXT, HTML, PDF}
TABLES = set(FORMATS.values()) - ONE_DOCUMENT_A_FILE
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
ARCHIVES = (".zip", ".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar")
METADATA = {"dataset_info.json", "state.json", "dataset_dict.json"}  # next to the rows that `datasets` saved

# Why a file is left out
HIDDEN = "hidden"
ARCHIVE = "an archive, which must be unpacked first"
UNKNOWN = "an ending of no known format"
NO_TARGET = "a link to nothing"
NO_ROWS = "documents, not rows"
NOT_DATA = "a description of the dataset"


class LocalFile(NamedTuple):
    """A file as it was when it was found: its format, its compression, its size, and the time of its last writing."""

    path: Path
    format: str
    compression: str
    size: int
    modified: int

    def require_unchanged(self, digest: str | None = None) -> None:
        """Raise UserError if the file was written since it was found; one that still has this SHA-256 was not."""
        status = self.path.stat()
        if (status.st_size, status.st_mtime_ns) != (self.size, self.modified) and (
            digest is None or status.st_size != self.size or sha256_of(self.path) != digest
        ):
            raise UserError(f"{self.path} changed while it was read: start again when nothing writes to it any more")


@dataclass(frozen=True)
class FoundFiles:
    """The files of a name in the order of their paths, and those left out, by reason."""

    files: Sequence[LocalFile] = ()
    left_out: Mapping[str, Sequence[str]] = field(default_factory=dict)


def is_local(name: str) -> bool:
    """Return whether a name is that of a file or a folder on this machine, or has the form of one's, or of a glob.

    Example:
        >>> is_local("data/lines.JSONL"), is_local("~/wiki/*.md"), is_local("somebody/lines")
        (True, True, False)
    """
    return (
        format_of(Path(name)) is not None
        or name[:1] in tuple("./~\\")
        or Path(name).suffix.lower() in (*COMPRESSIONS, *ARCHIVES)
        or glob.has_magic(name)
        or os.path.exists(name)
    )


def format_of(path: Path) -> tuple[str, str] | None:
    """Return the format and the compression that a file's name says, or None if it says no known format.

    Example:
        >>> format_of(Path("Lines.JSONL.gz")), format_of(Path("picture.png"))
        (('json', '.gz'), None)
    """
    compression = path.suffix.lower() if path.suffix.lower() in COMPRESSIONS else ""
    ending = Path(path.stem).suffix if compression else path.suffix
    kind = FORMATS.get(ending.lower())
    return None if kind is None or (compression and kind in (PARQUET, ARROW, PDF)) else (kind, compression)


def find_files(name: str, wanted: Collection[str] = frozenset(FORMATS.values())) -> FoundFiles:
    """Return the files that a path, a folder or a glob stands for.

    Args:
        name: an existing path, whatever its characters, or else a glob; `~` is the user's home.
        wanted: the formats to read; files in others are left out.

    Raises:
        UserError: there is no such file, a folder cannot be read, or no file is in a format that is wanted.
    """
    given = Path(name).expanduser()
    left_out: defaultdict[str, list[str]] = defaultdict(list)
    found = [] if os.path.exists(given) else [Path(path) for path in glob.glob(str(given), recursive=True)]
    paths = [given] if os.path.exists(given) else sorted(found)
    if not paths:
        kind = "no file matches this glob" if glob.has_magic(name) else "there is no such file"
        raise UserError(f"{name}: {kind} (looked in {_existing_parent(given)})")
    files = {}
    for path in paths:
        for each in _walk(path, left_out) if path.is_dir() else [path]:
            if (reason := _reason_to_leave_out(each, wanted, path.is_dir())) is None:
                status = each.stat()
                format, compression = format_of(each) or (TEXT, "")
                files[each] = LocalFile(each, format, compression, status.st_size, status.st_mtime_ns)
            else:
                left_out[reason].append(str(each))
    if not files:
        raise _nothing_to_read(name, given, left_out, wanted)
    return FoundFiles([files[path] for path in sorted(files)], left_out)


def _walk(folder: Path, left_out: Mapping[str, list[str]]) -> Iterator[Path]:
    """Yield all files below a folder that are not hidden; links to folders are followed, each folder once."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}; change its permissions, or leave it out")

    seen = set()
    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        for name in [each for each in folders if each.startswith(".")]:
            folders.remove(name)
            left_out[HIDDEN].append(os.path.join(parent, name, ""))
        yield from (Path(parent, name) for name in names)


def _reason_to_leave_out(path: Path, wanted: Collection[str], in_folder: bool) -> str | None:
    if in_folder and path.name.startswith("."):
        return HIDDEN
    if in_folder and path.name in METADATA:
        return NOT_DATA
    if not path.exists():
        return NO_TARGET
    format = format_of(path)
    if format is None or not path.is_file():
        is_archive = path.suffix.lower() in ARCHIVES or Path(path.stem).suffix.lower() == ".tar"
        return ARCHIVE if is_archive else UNKNOWN
    return None if format[0] in wanted else NO_ROWS


def _nothing_to_read(
    name: str, path: Path, left_out: Mapping[str, Sequence[str]], wanted: Collection[str]
) -> UserError:
    endings = ", ".join(ending for ending, kind in FORMATS.items() if kind in wanted)
    there = "; ".join(f"{reason}: {some_of(names)}" for reason, names in left_out.items())
    what = "the folder is empty" if path.is_dir() else "nothing to read"
    return UserError(f"{name}: {f'no readable file ({there})' if there else what}; files may end in {endings}")


def left_out_lines(left_out: Mapping[str, Sequence[str]]) -> list[str]:
    """Return a line for each reason why files are left out, with some of their names.

    Example:
        >>> left_out_lines({HIDDEN: ["texts/.notes"]})
        ['left out, hidden: texts/.notes']
    """
    return [f"left out, {reason}: {some_of(names)}" for reason, names in left_out.items()]


@cache
def log_once(report: str) -> None:
    """Log a report once in a process, however often the files are opened."""
    logger.info("%s", report)


def _existing_parent(path: Path) -> Path:
    """Return the nearest folder above a path that exists."""
    return next((parent for parent in path.absolute().parents if parent.is_dir()), Path("/"))
