"""Hash the files of a corpus, so that its identity is what it holds, not where it lies or when it was written.

A core hashes about a gigabyte a second. The hashes of large files are kept, so that a run starts at once when it is
resumed; a file that is written, replaced or moved is hashed again.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from huggingface_hub.constants import HF_HOME

from fgpt_hf.files import sha256_of, write_atomically

SMALL_BYTES = 1 << 26  # hashed within a tenth of a second, so never remembered


def file_hashes(files: Sequence[Path]) -> list[str]:
    """Return the SHA-256 of each file, in hexadecimal.

    Example:
        >>> from tempfile import mkdtemp
        >>> path = Path(mkdtemp(), "poems.txt")
        >>> _ = path.write_text("Roses are red")
        >>> [digest[:8] for digest in file_hashes([path])]
        ['f5848be4']
    """
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:  # hashing releases Python's lock
        return list(threads.map(_file_hash, files))


def _file_hash(path: Path) -> str:
    """Return a file's hash; that of a large one is kept in `fgpt/hashes` in `HF_HOME`."""
    status = path.stat()
    if status.st_size < SMALL_BYTES:
        return sha256_of(path)
    # Nobody can set back the time of a file's last change, unlike that of its last writing.
    identity = (str(path.resolve()), status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    kept = Path(HF_HOME, "fgpt", "hashes", sha256_of(repr(identity).encode()))
    if not kept.is_file() or len(kept.read_bytes()) != len(sha256_of(b"")):
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(kept, sha256_of(path))
    return kept.read_text(encoding="ascii")
