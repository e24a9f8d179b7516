"""Read `--dataset_name`: one dataset, or several with limits and repeats.

The grammar is `NAME[:MAX_ROWS][*REPEATS],…`. `books/,notes.jsonl:500,~/wiki/*.md*2` is all of a folder, at most 500
rows of a file, and the files of a glob twice an epoch. A path that exists on this machine is taken as it is: a
folder `a,b` is one folder, and `notes*2` a file.
"""

import glob
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fgpt_hf.errors import UserError


class MixtureEntry(NamedTuple):
    """One dataset of a mixture: at most `max_rows` of its rows, each `repeats` times an epoch on average."""

    name: str
    max_rows: int | None = None
    repeats: float = 1.0


def parse_mixture(text: str, option: str = "dataset_name") -> list[MixtureEntry]:
    """Return the datasets of a mixture `NAME[:MAX_ROWS][*REPEATS],…`.

    Raises:
        UserError: a name is empty or occurs twice, or a number is not above zero.

    Example:
        >>> parse_mixture("pydocs-chat:2000,rasbt-instruct*3")[1]
        MixtureEntry(name='rasbt-instruct', max_rows=None, repeats=3.0)
        >>> parse_mixture("wiki/*.md*2")
        [MixtureEntry(name='wiki/*.md', max_rows=None, repeats=2.0)]
    """
    pieces, entries = text.split(","), []
    while pieces:
        count = next((count for count in range(len(pieces), 1, -1) if _exists(",".join(pieces[:count]))), 1)
        entries.append(_parse_entry(",".join(pieces[:count]).strip(), f"{option}={text}"))
        del pieces[:count]
    names = [entry.name for entry in entries]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"{option}={text}: {twice} is named twice; name it once, or as {twice}*2 to read it twice")
    return entries


def parse_validation_names(text: str | None) -> list[MixtureEntry]:
    """Return the datasets of `--validation_dataset`, none without it: names as in a mixture, without repeats.

    Raises:
        UserError: as `parse_mixture`, or a dataset has repeats.

    Example:
        >>> parse_validation_names("held_out/,pydocs:100")[1]
        MixtureEntry(name='pydocs', max_rows=100, repeats=1.0)
    """
    entries = [] if text is None else parse_mixture(text, "validation_dataset")
    if repeated := next((entry for entry in entries if entry.repeats != 1), None):
        raise UserError(
            f"validation_dataset={text}: what is held out is read once, so leave out *{repeated.repeats:g} "
            f"after {repeated.name}"
        )
    return entries


def chosen_rows(max_rows: int | None, count: int) -> Sequence[int]:
    """Return the indices of the rows that a mixture takes: all, or a random choice that is always the same."""
    if max_rows is None or max_rows >= count:
        return range(count)
    return [int(index) for index in np.sort(np.random.default_rng(0).permutation(count)[:max_rows])]


def _parse_entry(entry: str, where: str) -> MixtureEntry:
    if _is_path(entry):
        return MixtureEntry(entry)
    if found := _split(entry):
        name, max_rows, repeats = found
        if max_rows != 0 and repeats != 0:
            return MixtureEntry(name, max_rows, repeats)
    elif glob.glob(os.path.expanduser(entry)):
        return MixtureEntry(entry)
    raise UserError(
        f"{where}: {entry!r} is not NAME, NAME:MAX_ROWS, NAME*REPEATS or NAME:MAX_ROWS*REPEATS with numbers above "
        "zero, such as pydocs-chat:2000 or rasbt-instruct*3"
    )


def _split(entry: str) -> MixtureEntry | None:
    """Return the name, the rows and the repeats of an entry."""
    match = re.fullmatch(r"(?P<name>.+?)(:(?P<rows>\d+))?(\*(?P<repeats>\d+(\.\d+)?))?", entry)
    if match is None:
        return None
    is_typo = re.fullmatch(r"[^*?\[]*[^\\/*?\[]\*[^\\/.*?]*", match["name"])  # one*much, not notes/*.md
    if is_typo and not _is_path(match["name"]):
        return None
    return MixtureEntry(match["name"], int(match["rows"]) if match["rows"] else None, float(match["repeats"] or 1))


def _exists(entry: str) -> bool:
    """Return whether an entry is an existing path, with or without limits after it."""
    found = _split(entry.strip())
    return _is_path(entry.strip()) or (found is not None and _is_path(found.name))


def _is_path(text: str) -> bool:
    return bool(text) and os.path.exists(os.path.expanduser(text))
