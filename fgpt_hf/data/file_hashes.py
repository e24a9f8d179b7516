"""Hash the files of a corpus: its identity is what it holds, not where it lies or when it was written.

A core hashes about a gigabyte a second. The hashes of large files are kept, so that a run starts at once when it is
resumed; a file that is written, replaced or moved is hashed again. The Hub is asked for the hashes of its files.
"""

import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import unquote

from huggingface_hub import HfApi, RepoFile
from huggingface_hub.constants import HF_HOME

from fgpt_hf.files import sha256_of, write_atomically
from fgpt_hf.retries import reading, retry

SMALL_BYTES = 1 << 26  # hashed within a tenth of a second, so never remembered
PATHS_PER_REQUEST = 500
HUB_FILE = re.compile(r"hf://datasets/(?P<repo_id>[^@]+)@(?P<revision>[^/]+)/(?P<path>.+)")


def file_identities(files: Sequence[str]) -> list[str]:
    """Return a hash of the content of each file on this machine or the Hub, and the URL of any other.

    Raises:
        UserError: the Hub cannot be reached.
    """
    local = [file for file in files if Path(file).is_file()]
    known = dict(zip(local, file_hashes([Path(file) for file in local]), strict=True))
    known |= hub_hashes([file for file in files if file not in known])
    return [known.get(file, file) for file in files]


def file_hashes(files: Sequence[Path]) -> list[str]:
    """Return the SHA-256 of each file, in hexadecimal.

    Example:
        >>> from tempfile import mkdtemp
        >>> path = Path(mkdtemp(), "poems.txt")
        >>> _ = path.write_text("Roses are red")
        >>> [digest[:8] for digest in file_hashes([path])]
        ['8522061b']
    """
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:  # hashing releases Python's lock
        return list(threads.map(_file_hash, files))


def hub_hashes(urls: Sequence[str]) -> Mapping[str, str]:
    """Return the Hub's hash of each file of a dataset by its URL, `hf://datasets/USER/NAME@COMMIT/PATH`.

    It is the SHA-256 of a large file, the same as `file_hashes` has, and git's hash of a small one.
    """
    urls_of: defaultdict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for url in urls:
        if match := HUB_FILE.fullmatch(url):
            urls_of[match["repo_id"], unquote(match["revision"])][match["path"]] = url
    hashes = {}
    for (repo_id, revision), url_of in urls_of.items():
        for first in range(0, len(url_of), PATHS_PER_REQUEST):
            paths = list(url_of)[first : first + PATHS_PER_REQUEST]
            for file in _files_on_hub(repo_id, revision, paths):
                hashes[url_of[file.path]] = file.lfs.sha256 if file.lfs else file.blob_id
    return hashes


def _files_on_hub(repo_id: str, revision: str, paths: Sequence[str]) -> list[RepoFile]:
    with reading(repo_id):
        found = retry(
            repo_id,
            lambda: HfApi().get_paths_info(repo_id, list(paths), revision=revision, repo_type="dataset"),
        )
    return [file for file in found if isinstance(file, RepoFile)]


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
