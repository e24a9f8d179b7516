"""Find a model, and refuse one that cannot be served, in words for those who visit the page and who keep it."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import get_local_safetensors_metadata, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    NotASafetensorsRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
)

logger = logging.getLogger(__name__)

RECORD = ("README.md", "metrics.jsonl", "samples.jsonl")
READ = ("*.json", "*.jsonl", "*.safetensors", "*.py", "*.jinja", "*.md", "*.txt")
BYTES_WHILE_LOADING: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "int8": 2}  # per parameter, at the peak
WORKING_MEMORY = 0.5e9  # bytes for the cache of a long reply and a prompt's activations
CGROUP = Path("/sys/fs/cgroup")


class ModelUnavailableError(ValueError):
    """A model that cannot be served; the message says why and what would work, and may be shown to anyone."""


def fetch(model_id: str) -> Path:
    """Return the folder of a model, and download it if it is a repository on the Hub.

    Raises:
        ModelUnavailableError: the Hub has no such repository or revision, does not show it, or cannot be reached.
    """
    if Path(model_id).is_dir():
        return Path(model_id)
    repo_id, _, revision = model_id.partition("@")
    try:
        return Path(snapshot_download(repo_id, revision=revision or None, allow_patterns=list(READ)))
    except RevisionNotFoundError as error:
        raise ModelUnavailableError(f"{repo_id} has no revision {revision!r}: name a branch, tag or commit") from error
    except GatedRepoError as error:
        raise ModelUnavailableError(
            f"{repo_id} asks its readers to accept its terms: accept them on its page, and set HF_TOKEN to a token of "
            "the same account"
        ) from error
    except RepositoryNotFoundError as error:
        token = "the one in HF_TOKEN does not" if os.environ.get("HF_TOKEN") else "set the secret HF_TOKEN to one"
        raise ModelUnavailableError(
            f"the Hub shows no model {repo_id}: the name is wrong, or it is private and needs a token that may read it "
            f"({token})"
        ) from error
    except HFValidationError as error:
        raise ModelUnavailableError(f"{model_id!r} is no folder here and no user/name on the Hub") from error
    except LocalEntryNotFoundError as error:
        raise ModelUnavailableError(
            f"{repo_id} cannot be downloaded: the Hub does not answer. Restart later"
        ) from error


def fetch_record(model_id: str) -> Path | None:
    """Return a folder with a model's card and training record, without its weights; None if the Hub shows none.

    A name that is no repository's, such as that of a folder on the machine of its author, is nothing to ask the Hub.
    """
    try:
        return Path(snapshot_download(model_id, allow_patterns=list(RECORD)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        logger.info("no record of %s: %s", model_id, error)
        return None


def parameter_count(folder: Path) -> int:
    """Return the number of stored parameters of a model, from the headers of its files.

    Raises:
        ModelUnavailableError: there are no such files, or they are damaged.
    """
    try:
        return sum(get_local_safetensors_metadata(folder).parameter_count.values())
    except (NotASafetensorsRepoError, SafetensorsParsingError) as error:
        raise ModelUnavailableError(f"{folder.name} holds no readable *.safetensors, which a Space serves") from error


def formats_that_fit(model_id: str, parameters: int, free_bytes: float) -> list[str]:
    """Return the number formats in which a model can be loaded, the largest first.

    Args:
        model_id: Its name, for messages.
        parameters: Number of its parameters.
        free_bytes: Memory for it and what it needs to write.

    Raises:
        ModelUnavailableError: there is none.

    Example:
        >>> formats_that_fit("user/name", 712_000_000, free_bytes=2.4e9)
        ['bfloat16', 'int8']
    """
    room = free_bytes - WORKING_MEMORY
    fitting = [name for name, size in BYTES_WHILE_LOADING.items() if parameters * size <= room]
    if fitting:
        return fitting
    smallest = min(BYTES_WHILE_LOADING.values())
    raise ModelUnavailableError(
        f"{model_id} is too large for this machine: its {parameters / 1e6:,.0f} million parameters need "
        f"{(parameters * smallest + WORKING_MEMORY) / 1e9:,.1f} GB of memory, and {free_bytes / 1e9:,.1f} GB are free. "
        f"A model of {max(0, room) / smallest / 1e6:,.0f} million parameters would fit, or hardware with more memory"
    )


def free_memory() -> float:
    """Return the bytes of memory that are free here, or that a container's limit leaves if that is less.

    A system that does not say, such as Windows, has endless memory.
    """
    free = float("inf")
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    return min(free, *(_left(CGROUP / limit, CGROUP / used) for limit, used in _CGROUP_FILES))


# Of version 2 and 1 of control groups: the limit, and what is taken of it.
_CGROUP_FILES = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)


def _left(limit: Path, used: Path) -> float:
    if not limit.is_file() or not (text := limit.read_text().strip()).isdecimal():
        return float("inf")
    stat = limit.with_name("memory.stat")
    numbers = dict(line.split() for line in stat.read_text().splitlines()) if stat.is_file() else {}
    cached = int(numbers.get("inactive_file", 0)) or int(numbers.get("total_inactive_file", 0))
    return max(0, int(text) - int(used.read_text()) + cached)
