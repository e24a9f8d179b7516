"""Read the documents of files on this machine, as shards of a corpus.

All files are read once before the first step (`file_scans`). What is found is logged.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fgpt_hf.config.data_options import TextSource
from fgpt_hf.data.dataset_names import MixtureEntry
from fgpt_hf.data.extracted_text import NO_TEXT
from fgpt_hf.data.file_scans import FORMAT_VERSION, FileScan, ScannedFile, scan_once
from fgpt_hf.data.local_files import ARROW, PARQUET, PDF, TEXT, FoundFiles, find_files, left_out_lines, log_once
from fgpt_hf.data.positions import DOCUMENTS_AT_ONCE, ShardPosition, Texts
from fgpt_hf.data.readers import read_documents
from fgpt_hf.data.splits import HELD_OUT
from fgpt_hf.errors import UserError
from fgpt_hf.files import sha256_of
from fgpt_hf.retries import reading
from fgpt_hf.wording import count_of, some_of

SHARD_BYTES = 1 << 26  # files are read together until they have this size
CHARACTERS_AT_ONCE = 8_000_000


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

    def read(self, start: ShardPosition) -> Iterator[Texts]:
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
    scans = scan_once(list(files.values()), source)
    held_out = {file.path for entry in validation for file in found[entry].files}
    return [
        *_open_entries(validation, found, scans, excluded=(), is_validation=True),
        *_open_entries(training, found, scans, excluded=held_out, is_validation=False),
    ]


def _open_entries(
    entries: Sequence[MixtureEntry],
    found: Mapping[MixtureEntry, FoundFiles],
    scans: Mapping[Path, ScannedFile],
    excluded: Collection[Path],
    is_validation: bool,
) -> list[LocalShard]:
    """Return the shards of the files that are held out, or of those that are not, and say what they hold."""
    if not entries:
        return []
    left_out: defaultdict[str, list[str]] = defaultdict(list)
    shards, chosen, taken = [], [], set(excluded)
    for entry in entries:
        for reason, names in found[entry].left_out.items():
            left_out[reason].extend(names)
        paths = [file.path for file in found[entry].files]
        if both := [str(path) for path in paths if path in excluded]:
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
