"""Read the documents of files on this machine, as shards of a corpus.

All files are read once before the first step: that counts the documents, recognizes encodings and columns, and finds
empty and equal documents, which are left out. The findings are logged, and cached for large files, so that a
resumed run starts at once.
"""

import logging
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from huggingface_hub.constants import HF_HOME

from fgpt_hf.config.option_groups import TextSource
from fgpt_hf.data.columns import choose_column, require_column
from fgpt_hf.data.dataset_names import MixtureEntry
from fgpt_hf.data.encodings import encoding_of
from fgpt_hf.data.extracted_text import NO_TEXT
from fgpt_hf.data.file_hashes import SMALL_BYTES, file_hashes
from fgpt_hf.data.local_files import (
    ARROW,
    PARQUET,
    PDF,
    TABLES,
    TEXT,
    FoundFiles,
    LocalFile,
    find_files,
    left_out_lines,
    log_once,
)
from fgpt_hf.data.positions import ShardPosition
from fgpt_hf.data.readers import ReadOptions, read_documents
from fgpt_hf.errors import UserError
from fgpt_hf.files import read_sealed_json, sha256_of, write_sealed_json
from fgpt_hf.parsing import as_type
from fgpt_hf.retries import reading
from fgpt_hf.wording import count_of, some_of

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1  # to be raised whenever the same files would give other documents
SHARD_BYTES = 1 << 26  # files are read together until they have this size
DOCUMENTS_AT_ONCE = 1000
CHARACTERS_AT_ONCE = 8_000_000
NO_ENCODING = {PARQUET, ARROW, PDF}
HELD_OUT = "held out by validation_dataset"  # why a file is left out


@dataclass(frozen=True)
class FileScan:
    """What was found in a file.

    Attributes:
        options: how the file is read.
        documents: the number of all its documents, with those that are left out.
        characters: those of all documents.
        blank: the numbers of the documents without text, from 0.
        equal: the numbers of the documents that an earlier one equals.
        not_chosen: the numbers of the documents beyond the limit of a mixture.
    """

    options: ReadOptions
    documents: int = 0
    characters: int = 0
    blank: list[int] = field(default_factory=list)
    equal: list[int] = field(default_factory=list)
    not_chosen: list[int] = field(default_factory=list)

    @property
    def kept(self) -> int:
        """The number of documents that are read."""
        return self.documents - len(self.blank) - len(self.equal) - len(self.not_chosen)


class ScannedFile(NamedTuple):
    """A file, its SHA-256, and what was found in it."""

    file: LocalFile
    digest: str
    scan: FileScan


@dataclass(frozen=True)
class LocalShard:
    """Files that are read one after the other. It has one part; documents that are left out count as None.

    Attributes:
        files: what is read.
        repeats: how often an epoch has each document, on average.
        is_validation: whether all documents are held out.
    """

    files: Sequence[ScannedFile]
    repeats: float = 1.0
    is_validation: bool = False

    @property
    def name(self) -> str:
        """The first file, and the number of the others."""
        others = len(self.files) - 1
        return str(self.files[0].file.path) + (f" and {others:,} more" if others else "")

    @property
    def version(self) -> str:
        """A hash of the content, of how it is read, and of which documents are left out."""
        parts = [(digest, scan) for _, digest, scan in self.files]
        return sha256_of(repr((FORMAT_VERSION, parts)).encode())

    def read(self, start: ShardPosition) -> Iterator[tuple[list[str | None], ShardPosition]]:
        """Yield the texts from a position on, as `corpora.Shard` has it."""
        texts: list[str | None] = []
        position = start.documents
        characters = 0
        for text in self._texts(start.documents):
            texts.append(text)
            characters += len(text or "")
            if len(texts) == DOCUMENTS_AT_ONCE or characters >= CHARACTERS_AT_ONCE:
                position += len(texts)
                yield texts, ShardPosition(0, position)
                texts, characters = [], 0
        if texts:
            yield texts, ShardPosition(0, position + len(texts))

    def _texts(self, start: int) -> Iterator[str | None]:
        for file, digest, scan in self.files:
            if start >= scan.documents:
                start -= scan.documents
                continue
            file.require_unchanged(digest)
            left_out = {*scan.blank, *scan.equal, *scan.not_chosen}
            with reading(str(file.path)):
                for number, text in enumerate(read_documents(file, scan.options, start), start=start):
                    yield None if number in left_out else text
            file.require_unchanged(digest)
            start = 0


def open_local(entries: Sequence[tuple[MixtureEntry, bool]], source: TextSource) -> list[LocalShard]:
    """Return the shards of the files that names on this machine stand for, and say what they hold.

    Args:
        entries: names, each with whether its documents are held out; a file or a document that is in both kinds is.

    Raises:
        UserError: there are no such files, one of them cannot be read, or none of them holds text.

    Example:
        >>> from tempfile import mkdtemp
        >>> folder = Path(mkdtemp())
        >>> for name in ("a.txt", "b.txt"):
        ...     _ = (folder / name).write_text(f"A poem called {name}")
        >>> (shard,) = open_local([(MixtureEntry(str(folder)), False)], TextSource())
        >>> list(shard.read(ShardPosition()))
        [(['A poem called a.txt', 'A poem called b.txt'], ShardPosition(part=0, documents=2))]
    """
    validation, training = ([entry for entry, is_held_out in entries if is_held_out == kind] for kind in (True, False))
    found = {entry: find_files(entry.name) for entry in (*validation, *training)}  # of equal documents, the first stays
    files = {file.path: file for each in found.values() for file in each.files}
    scans = _scan_once(list(files.values()), source)
    held_out = {file.path for entry in validation for file in found[entry].files}
    shards = _open_entries(validation, found, scans, held_out, is_validation=True) if validation else []
    return shards + (_open_entries(training, found, scans, held_out, is_validation=False) if training else [])


def _open_entries(
    entries: Sequence[MixtureEntry],
    found: Mapping[MixtureEntry, FoundFiles],
    scans: Mapping[Path, ScannedFile],
    held_out: Collection[Path],
    is_validation: bool,
) -> list[LocalShard]:
    """Return the shards of the files that are held out, or of those that are not, and say what they hold."""
    left_out: defaultdict[str, list[str]] = defaultdict(list)
    shards, chosen = [], []
    taken: set[Path] = set() if is_validation else set(held_out)
    for entry in entries:
        for reason, names in found[entry].left_out.items():
            left_out[reason].extend(names)
        paths = [file.path for file in found[entry].files]
        if not is_validation and (both := [str(path) for path in paths if path in held_out]):
            left_out[HELD_OUT].extend(both)
        scanned = _limited([scans[path] for path in paths if path not in taken], entry.max_rows)
        taken.update(paths)
        chosen += scanned
        shards += [LocalShard(group, entry.repeats, is_validation) for group in _grouped(scanned)]
    names = ", ".join(entry.name for entry in entries)
    report = _report(f"validation_dataset={names}" if is_validation else names, chosen, left_out)
    if not any(scan.kept for _, _, scan in chosen):
        raise UserError(f"no text in {report}")
    log_once(report)
    return shards


def _grouped(files: Iterable[ScannedFile]) -> Iterator[list[ScannedFile]]:
    """Yield the files that hold documents in groups of about `SHARD_BYTES`; files that open at any row stay alone."""
    group: list[ScannedFile] = []
    for each in files:
        if not each.scan.kept:
            continue
        alone = each.file.format in (PARQUET, ARROW)
        if group and (alone or sum(other.file.size for other in group) + each.file.size > SHARD_BYTES):
            yield group
            group = []
        group.append(each)
        if alone:
            yield group
            group = []
    if group:
        yield group


def _limited(files: list[ScannedFile], max_rows: int | None) -> list[ScannedFile]:
    """Leave out all but `max_rows` documents, in a random choice that is always the same."""
    total = sum(each.scan.kept for each in files)
    if max_rows is None or total <= max_rows:
        return files
    rejected = np.sort(np.random.default_rng(0).permutation(total)[max_rows:])
    limited, before = [], 0
    for file, digest, scan in files:
        kept = np.setdiff1d(np.arange(scan.documents), [*scan.blank, *scan.equal])
        here = rejected[(rejected >= before) & (rejected < before + len(kept))] - before
        fields = {**vars(scan), "not_chosen": kept[here].tolist()}
        limited.append(ScannedFile(file, digest, FileScan(**fields)))
        before += len(kept)
    return limited


# Scan


def _scan_once(files: Sequence[LocalFile], source: TextSource) -> Mapping[Path, ScannedFile]:
    """Return what is in each file, which is kept in `fgpt/scans` in `HF_HOME` if the files are large."""
    digests = file_hashes([file.path for file in files])
    options = (source.text_column_name, source.document_separator, source.encoding)
    key = sha256_of(
        repr((FORMAT_VERSION, options, [(file.format, file.compression) for file in files], digests)).encode()
    )
    kept = Path(HF_HOME, "fgpt", "scans", f"{key}.json")
    scans = _read_scans(kept)
    if scans is None:
        scans = _scan(files, source)
        for file, digest in zip(files, digests, strict=True):
            file.require_unchanged(digest)
        if sum(file.size for file in files) >= SMALL_BYTES:
            write_sealed_json(kept, {"scans": [asdict(scan) for scan in scans]})
    return {
        file.path: ScannedFile(file, digest, scan) for file, digest, scan in zip(files, digests, scans, strict=True)
    }


def _read_scans(kept: Path) -> list[FileScan] | None:
    try:
        return list(as_type(_Scans, read_sealed_json(kept)).scans) if kept.is_file() else None
    except UserError as error:
        logger.warning("%s; the files are read again", error)
        return None


@dataclass(frozen=True)
class _Scans:
    scans: list[FileScan]


def _scan(files: Sequence[LocalFile], source: TextSource) -> list[FileScan]:
    scans: list[FileScan] = []
    hashes = []
    for file in files:
        with reading(str(file.path)):
            scan, found = _scan_file(file, _read_options(file, source))
        if file.format in TABLES and scan.documents:
            require_column(file, scan.options, has_documents=bool(scan.kept))
        scans.append(scan)
        hashes.append(found)
    first = np.unique(np.concatenate(hashes), return_index=True)[1]
    is_equal = np.ones(sum(map(len, hashes)), dtype=np.bool_)
    is_equal[first] = False
    before = 0
    for scan, found in zip(scans, hashes, strict=True):
        equal = np.flatnonzero(is_equal[before : before + len(found)])
        before += len(found)
        if len(equal):
            scan.equal.extend(np.setdiff1d(np.arange(scan.documents), scan.blank)[equal].tolist())
    return scans


def _read_options(file: LocalFile, source: TextSource) -> ReadOptions:
    encoding = "utf-8" if file.format in NO_ENCODING else encoding_of(file, source.encoding)
    column = choose_column(file, encoding, source.text_column_name) if file.format in TABLES else None
    separator = source.document_separator and source.document_separator.replace(r"\n", "\n").replace(r"\t", "\t")
    return ReadOptions(encoding, column, separator or None)


def _scan_file(file: LocalFile, options: ReadOptions) -> tuple[FileScan, npt.NDArray[np.uint64]]:
    """Return what is in a file, and a hash of each document that has text."""
    hashes, blank = bytearray(), []
    documents = characters = 0
    for text in read_documents(file, options):
        if not text or text.isspace():
            blank.append(documents)
        else:
            hashes += blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
            characters += len(text)
        documents += 1
    return FileScan(options, documents, characters, blank), np.frombuffer(bytes(hashes), dtype=np.uint64)


# Report


def _report(name: str, files: Sequence[ScannedFile], left_out: Mapping[str, Sequence[str]]) -> str:
    """Return what was read in a line, and lines on columns, encodings, separators and what was left out."""
    scans = [scan for _, _, scan in files]
    lines = [
        f"{name}: {count_of(len(files), 'file')}, {count_of(sum(scan.kept for scan in scans), 'document')}, "
        f"{sum(scan.characters for scan in scans):,} characters"
    ]
    columns = Counter(scan.options.column for scan in scans if scan.options.column)
    lines += [f"documents are in the column {column} of {count_of(count, 'file')}" for column, count in columns.items()]
    encodings: defaultdict[str, list[str]] = defaultdict(list)
    for file, _, scan in files:
        if scan.options.encoding not in ("utf-8", "utf-8-sig"):
            encodings[scan.options.encoding].append(str(file.path))
    lines += [f"read as {encoding} text: {some_of(names)}" for encoding, names in encodings.items()]
    divided = [
        f"{file.path} ({scan.documents:,})" for file, _, scan in files if file.format == TEXT and scan.documents > 1
    ]
    if divided:
        lines.append(f"divided into documents at separators: {some_of(divided)}")
    reasons = {**left_out, **_left_out_of(files)}
    return "\n".join([*lines, *left_out_lines(reasons)])


def _left_out_of(files: Sequence[ScannedFile]) -> dict[str, list[str]]:
    """Return the files with documents that are left out, by reason."""
    reasons: defaultdict[str, list[str]] = defaultdict(list)
    for file, _, scan in files:
        without_text = NO_TEXT if file.format == PDF else "no text"
        for reason, numbers in (
            (without_text, scan.blank),
            ("a repetition of an earlier document", scan.equal),
            ("beyond the limit that was given", scan.not_chosen),
        ):
            if numbers:
                of_rows = f" ({count_of(len(numbers), 'document')})" if scan.documents > 1 else ""
                reasons[reason].append(f"{file.path}{of_rows}")
        if not scan.documents:
            reasons["empty"].append(str(file.path))
    return reasons
