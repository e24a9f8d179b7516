"""Check that a tag, the version in `pyproject.toml` and the changelog agree: `python .github/release_check.py v1.2.0`.

Without a tag it checks what holds between releases: the version is newer than each release in the changelog.
"""

import re
import sys
import tomllib
from pathlib import Path

from packaging.version import Version

ROOT = Path(__file__).parents[1]
HEADING = re.compile(r"^## \[([^\]]+)\](?: - (\d{4}-\d\d-\d\d))?$", re.MULTILINE)


def disagreement(version: str, changelog: str, tag: str | None = None) -> str | None:
    """Return in what a version, a changelog and a release's tag disagree, or None.

    Example:
        >>> disagreement("1.1.0", "## [1.1.0] - 2026-12-01\\n## [1.0.0] - 2026-11-01", "v1.1.0")
        >>> disagreement("1.1.0.dev0", "## [Unreleased]\\n## [1.0.0] - 2026-11-01", "v1.1.0")
        'the tag is v1.1.0, and pyproject.toml has version 1.1.0.dev0'
        >>> disagreement("1.0.0.dev0", "## [Unreleased]\\n## [1.0.0] - 2026-11-01")
        'pyproject.toml has version 1.0.0.dev0, which is not newer than 1.0.0 in CHANGELOG.md'
    """
    headings = HEADING.findall(changelog)
    released = [(Version(name), date) for name, date in headings if name != "Unreleased"]
    if [found for found, _ in released] != sorted({found for found, _ in released}, reverse=True):
        return "the releases in CHANGELOG.md are not in order, newest first"
    newest, date = released[0] if released else (Version("0"), "")
    if tag is None:
        if Version(version) < newest or (Version(version) == newest and headings[0][0] == "Unreleased"):
            return f"pyproject.toml has version {version}, which is not newer than {newest} in CHANGELOG.md"
        return None
    if tag != f"v{version}":
        return f"the tag is {tag}, and pyproject.toml has version {version}"
    if newest != Version(version) or not date:
        return f"CHANGELOG.md has no heading '## [{version}] - DATE' at its top"
    return None


def main(tag: str | None = None) -> None:
    """Exit with 1 and a line on stderr if something disagrees."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    problem = disagreement(project["version"], (ROOT / "CHANGELOG.md").read_text("utf-8"), tag)
    if problem:
        sys.exit(problem)


if __name__ == "__main__":
    main(*sys.argv[1:])
