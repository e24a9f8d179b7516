"""The files for contributors are valid, and lead where they say."""

import doctest
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
YAML = [*(ROOT / ".github").rglob("*.yml"), ROOT / "CITATION.cff", ROOT / ".pre-commit-config.yaml"]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "recipes/README.md")),
    *(ROOT / "docs").glob("*.md"),
]


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text("utf-8"))


@pytest.mark.parametrize("path", YAML, ids=lambda path: path.name)
def test_each_configuration_file_is_yaml(path: Path) -> None:
    assert isinstance(load(path), dict)


def test_each_job_of_the_workflows_has_a_machine_and_steps() -> None:
    workflows = list((ROOT / ".github" / "workflows").glob("*.yml"))
    assert workflows
    for workflow in workflows:
        for name, job in load(workflow)["jobs"].items():
            assert job["runs-on"] and all("run" in step or "uses" in step for step in job["steps"]), name


def test_the_citation_has_what_its_format_requires() -> None:
    citation = load(ROOT / "CITATION.cff")
    assert citation["cff-version"] == "1.2.0" and citation["message"] and citation["title"] and citation["authors"]


def test_the_issue_forms_have_what_their_format_requires() -> None:
    forms = [path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml"]
    assert len(forms) >= 2
    for form in map(load, forms):
        assert form["name"] and form["description"]
        for field in form["body"]:
            assert field["type"] == "markdown" or (field["id"] and field["attributes"]["label"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)", page.read_text("utf-8")):
        assert link.startswith("https://") or (page.parent / link).exists(), link


def test_the_index_lists_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text("utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"]({page.name})" in index, page


@pytest.fixture(scope="module")
def release_check() -> Any:
    spec = importlib.util.spec_from_file_location("release_check", ROOT / ".github" / "release_check.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_version_and_the_changelog_are_in_step(release_check: Any) -> None:
    release_check.main()
    assert doctest.testmod(release_check).failed == 0


@pytest.mark.parametrize(
    ("version", "changelog", "tag", "said"),
    [
        ("1.1.0", "## [Unreleased]\n## [1.1.0] - 2026-12-01", None, "is not newer than 1.1.0"),
        ("1.1.0", "## [1.1.0]", "v1.1.0", "has no heading '## [1.1.0] - DATE' at its top"),
        ("1.1.0", "## [Unreleased]\n## [1.0.0] - 2026-11-01", "v1.1.0", "has no heading"),
        ("1.1.0", "## [1.0.0] - 2026-11-01\n## [1.1.0] - 2026-12-01", None, "not in order, newest first"),
    ],
)
def test_a_release_that_is_out_of_step_is_refused(
    release_check: Any, version: str, changelog: str, tag: str | None, said: str
) -> None:
    assert said in release_check.disagreement(version, changelog, tag)
