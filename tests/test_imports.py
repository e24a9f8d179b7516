"""The package imports without its optional dependencies."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SUPPORT = ROOT / "tests" / "support"


@pytest.mark.slow
def test_every_module_and_help_works_with_the_minimal_dependencies(tmp_path: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("\n".join(["fgpt-hf", *project["dependencies"]]), encoding="utf-8")
    command = [sys.executable, SUPPORT / "needed_only.py", requirements, SUPPORT / "import_all.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "modules imported" in done.stdout and "commands have help" in done.stdout
