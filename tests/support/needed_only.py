"""Run a script where only the distributions that given requirements bring can be imported.

`python tests/support/needed_only.py REQUIREMENTS.txt SCRIPT.py`; the folder of the script is not on the path.
"""

import importlib.machinery
import importlib.util
import re
import runpy
import sys
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from packaging.requirements import Requirement


def needed_distributions(requirements: Iterable[str]) -> set[str]:
    """Return the normalized names of all distributions that these requirements bring, directly or indirectly."""
    found: dict[str, set[str]] = {}
    waiting = [Requirement(line) for line in requirements]
    while waiting:
        requirement = waiting.pop()
        name, extras = _normalized(requirement.name), {"", *requirement.extras}
        if extras <= found.get(name, set()):
            continue
        found.setdefault(name, set()).update(extras)
        try:
            needed = [Requirement(line) for line in metadata.requires(name) or ()]
        except metadata.PackageNotFoundError:
            continue  # for another system
        waiting += [r for r in needed if r.marker is None or any(r.marker.evaluate({"extra": e}) for e in extras)]
    return set(found)


class OnlyNeeded:
    """Finds modules as `finders` do, but none of a distribution that is not needed."""

    def __init__(self, finders: Sequence[Any], needed: set[str], hidden: Iterable[str] = ()) -> None:
        owners = metadata.packages_distributions()
        self.hidden = {top for top, names in owners.items() if not needed & set(map(_normalized, names))} | set(hidden)
        self.finders = list(finders)
        self.find_distributions = importlib.machinery.PathFinder.find_distributions
        self.invalidate_caches = importlib.machinery.PathFinder.invalidate_caches

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> Any:
        if name.partition(".")[0] in self.hidden:
            return None
        return next(filter(None, (finder.find_spec(name, path, target) for finder in self.finders)), None)


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def main(requirements: str, script: str) -> None:
    lines = [line for line in Path(requirements).read_text("utf-8").splitlines() if line and line[0] not in "#-"]
    own = () if "fgpt-hf" in lines else ("fgpt_hf",)
    sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).parent]
    sys.meta_path[:] = [OnlyNeeded(sys.meta_path, needed_distributions(lines), ("tests", *own))]
    sys.argv = [script]
    sys.path.insert(0, str(Path(script).resolve().parent))
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
