"""Build the embedded corpus: the docstrings of the packages installed in the running environment.

It is real text on any machine, without a network: with this project's dependencies some 9,000 documents, 13 million
tokens. The first use takes a minute on two cores, later ones read a cache. Sources are parsed and never imported. It is
too small and too uniform for a useful model; for that stream `fineweb-edu`.
"""

from __future__ import annotations

import ast
import gc
import logging
import os
import platform
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from hashlib import sha256
from importlib.util import decode_source
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from tqdm.auto import tqdm

from fgpt_hf.errors import UserError
from fgpt_hf.files import PARTIAL, atomic_directory, integrity_error, locked, remove, write_manifest
from fgpt_hf.workers import process_pool

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1  # to be raised whenever the same packages would give other text
MAX_SOURCE_BYTES = 1_000_000  # longer files are generated tables
MAX_ARGUMENTS_CHARACTERS = 400  # one signature in a hundred is longer, up to 23,000
FILES_PER_WORKER = 1_000  # about the work that pays for starting a process
TEST_FOLDERS = {"tests", "test"}  # a fifth of the parsing for a fiftieth of the text, none of it about an interface

Documentable: TypeAlias = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class Member(NamedTuple):
    """A documented module, class, function or method.

    Attributes:
        name: the full dotted name, unique within its module.
        kind: `module`, `class`, `function` or `method`.
        signature: such as `MaskedArray.filled(self, fill_value=None)` or `class MaskedArray(ndarray)`; empty for a
            module.
        docstring: the text without its indentation, never blank.
    """

    name: str
    kind: str
    signature: str
    docstring: str


def load_pydocs(cache_dir: Path | None = None, search_paths: Sequence[Path] | None = None) -> Dataset:
    """Return the docstrings under `search_paths`, a row for each module.

    Columns: `id`, the module's dotted name, ascending and unique; `text`, the document; `members`, its list of
    `Member` fields in source order. Each docstring occurs once in the whole dataset, and the project's own are not
    in it. Built on the first call and cached until the installed packages or Python change; a damaged cache is built
    again.

    Args:
        cache_dir: the cache's folder (default: `fgpt/pydocs` in `HF_HOME`).
        search_paths: folders of packages (default: this environment's site-packages).

    Raises:
        UserError: nothing is documented there, or the cache cannot be written.
    """
    from datasets import load_from_disk  # not above: the processes that read sources import this module
    from huggingface_hub.constants import HF_HOME

    site_packages = [Path(sysconfig.get_path(scheme)) for scheme in ("purelib", "platlib")]  # often one folder
    paths = site_packages if search_paths is None else search_paths
    roots = list(dict.fromkeys(Path(path).resolve() for path in paths))
    folder = Path(cache_dir or Path(HF_HOME, "fgpt", "pydocs")) / _environment_key(roots)
    if integrity_error(folder) is not None:
        _build(roots, folder)
    return load_from_disk(folder)


def module_members(source: str, module: str) -> list[Member]:
    """Return the documented members of one module's source in order; the first documented definition of a name counts.

    Definitions inside functions are left out, since no name leads to them.

    Raises:
        SyntaxError: the source does not parse.

    Example:
        >>> (member,) = module_members('def join(a, *others):\\n    "Join path segments."', "os.path")
        >>> member.name, member.signature, member.docstring
        ('os.path.join', 'join(a, *others)', 'Join path segments.')
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's invalid escape sequences
        tree = ast.parse(source)
    members: dict[str, Member] = {}
    definitions: list[tuple[str, str, Documentable]] = [("", "module", tree), *_definitions(tree.body)]
    for name, kind, node in definitions:
        docstring = ast.get_docstring(node) or ""
        if docstring.strip() and name not in members:
            # An escaped lone surrogate is legal in a docstring and impossible in UTF-8.
            docstring = docstring.encode("utf-8", "replace").decode("utf-8")
            full_name = f"{module}.{name}" if name else module
            members[name] = Member(full_name, kind, _signature(node, name), docstring)
    return list(members.values())


def _definitions(body: Sequence[ast.AST], owner: str = "") -> Iterator[tuple[str, str, Documentable]]:
    """Yield (name within the module, kind, node), also from the branches of `if`, `try`, `with` and loops."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield owner + node.name, "method" if owner else "function", node
        elif isinstance(node, ast.ClassDef):
            yield owner + node.name, "class", node
            yield from _definitions(node.body, f"{owner}{node.name}.")
        else:
            for branch in ("body", "handlers", "orelse", "finalbody"):
                yield from _definitions(getattr(node, branch, []), owner)


def _signature(node: Documentable, name: str) -> str:
    if isinstance(node, ast.Module):
        return ""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(map(ast.unparse, node.bases))
        return f"class {name}({bases})" if bases else f"class {name}"
    arguments = ast.unparse(node.args)
    if len(arguments) > MAX_ARGUMENTS_CHARACTERS:
        arguments = "..."
    prefix = "async " if isinstance(node, ast.AsyncFunctionDef) else ""
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{prefix}{name}({arguments}){returns}"


def _environment_key(roots: list[Path]) -> str:
    """Name the cache after all that its content follows from; metadata folders carry distributions and versions."""
    distributions = sorted(path.name for root in roots for path in root.glob("*.*-info"))
    parts = [str(FORMAT_VERSION), platform.python_version(), *map(str, roots), *distributions]
    return sha256("\n".join(parts).encode()).hexdigest()[:16]


def _build(roots: list[Path], folder: Path) -> None:
    """Write the dataset to `folder` in one step; of processes that want one, one builds and the others wait."""
    try:
        with locked(folder.parent / "build.lock"):
            for unfinished in folder.parent.glob(f"*{PARTIAL}"):  # of a process that was killed
                remove(unfinished)
            if (problem := integrity_error(folder)) is None:
                return
            if folder.exists():
                logger.warning("%s is damaged (%s), so the corpus is built again", folder, problem)
            with atomic_directory(folder) as partial:
                _dataset(_documented_modules(roots)).save_to_disk(partial)
                write_manifest(partial)
    except OSError as error:
        remedy = "set HF_HOME to a writable folder with 200 MB free"
        raise UserError(f"pydocs cannot be cached in {folder.parent} ({error}): {remedy}") from error


def _documented_modules(roots: list[Path]) -> dict[str, list[Member]]:
    """Return module → members for every module that has any, each docstring once."""
    sources: dict[str, Path] = {}
    for root in roots:
        for module, path in _sources(root):
            sources.setdefault(module, path)
    members = dict(zip(sources, _read_all(list(sources.items())), strict=True))
    skipped = sum(found is None for found in members.values())
    documented = _without_repetitions({module: found for module, found in members.items() if found})
    if not documented:
        where = ", ".join(map(str, roots))
        raise UserError(f"pydocs found no docstring in {len(sources)} Python files under {where}: install a package")
    logger.info("pydocs: %d of %d modules have docstrings, %d skipped", len(documented), len(sources), skipped)
    return documented


def _sources(root: Path) -> Iterator[tuple[str, Path]]:
    """Yield (module, path) of each Python file; linked folders are not entered, so that no link can form a loop."""
    paths: list[Path] = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in TEST_FOLDERS]
        paths += [Path(folder, name) for name in files if name.endswith(".py")]
    for path in sorted(paths):  # however the file system listed them
        parts = path.relative_to(root).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if parts and parts[0] != __name__.partition(".")[0]:
            yield ".".join(parts), path


def _read_all(sources: list[tuple[str, Path]]) -> list[list[Member] | None]:
    workers = min(os.cpu_count() or 1, len(sources) // FILES_PER_WORKER)
    progress = partial(tqdm, total=len(sources), desc="Reading docstrings", unit=" files", mininterval=1)
    if workers < 2:
        return list(progress(map(_read, sources)))
    # Without garbage collection, because it walks the syntax trees again and again and finds no cycles.
    with process_pool(workers, initializer=gc.disable) as pool:
        return list(progress(pool.map(_read, sources, chunksize=32)))


def _read(source: tuple[str, Path]) -> list[Member] | None:
    """Return the module's members, or None where the file cannot be read, decoded or parsed, or is too long."""
    module, path = source
    try:
        if not path.is_file() or path.stat().st_size > MAX_SOURCE_BYTES:
            return None
        return module_members(decode_source(path.read_bytes()), module)
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _without_repetitions(documented: dict[str, list[Member]]) -> dict[str, list[Member]]:
    """Leave each docstring where its path is shortest, so that `rich` keeps its own and `pip._vendor.rich` goes."""
    seen: set[str] = set()
    kept: dict[str, list[Member]] = {}
    for module in sorted(documented, key=lambda module: (module.count("."), module)):
        fresh = []
        for member in documented[module]:
            if member.docstring not in seen:
                seen.add(member.docstring)
                fresh.append(member)
        if fresh:
            kept[module] = fresh
    return kept


def _dataset(documented: dict[str, list[Member]]) -> Dataset:
    from datasets import Dataset, Features, Value

    member = {field: Value("string") for field in Member._fields}
    features = Features({"id": Value("string"), "text": Value("string"), "members": [member]})
    rows = [
        {"id": module, "text": _text(module, members), "members": [found._asdict() for found in members]}
        for module, members in sorted(documented.items())
    ]
    return Dataset.from_list(rows, features=features)


def _text(module: str, members: list[Member]) -> str:
    """Return the document: the module's name, then each member's signature and, on the next line, its docstring."""
    return "\n\n".join([module, *(f"{member.signature}\n{member.docstring}".lstrip() for member in members)])
