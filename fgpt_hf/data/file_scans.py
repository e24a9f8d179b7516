"""Read files once before the first step, to learn what they hold.

That counts the documents, recognizes encodings and columns, and finds empty and equal documents, which are left out.
The findings are cached for large files, so that a resumed run starts at once.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from huggingface_hub.constants import HF_HOME

from fgpt_hf.config.data_options import TextSource
from fgpt_hf.data.columns import choose_column, require_column
from fgpt_hf.data.encodings import encoding_of
from fgpt_hf.data.file_hashes import SMALL_BYTES, file_hashes
from fgpt_hf.data.local_files import ARROW, PARQUET, PDF, TABLES, LocalFile
from fgpt_hf.data.readers import ReadOptions, read_documents
from fgpt_hf.errors import UserError
from fgpt_hf.files import read_sealed_json, sha256_of, write_sealed_json
from fgpt_hf.parsing import as_type
from fgpt_hf.retries import reading

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1  # to be raised whenever the same files would give other documents
NO_ENCODING = {PARQUET, ARROW, PDF}


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


def scan_once(files: Sequence[LocalFile], source: TextSource) -> Mapping[Path, ScannedFile]:
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
