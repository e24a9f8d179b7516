"""The built wheel does all that a clone does: it trains, chats and publishes from an empty folder."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILT_FROM = ("fgpt_hf", "space", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")
Command = Callable[..., str]


@pytest.fixture(scope="module")
def fgpt(tmp_path_factory: pytest.TempPathFactory) -> Command:
    """Return a function that runs the wheel's `fgpt` in an empty folder, and gives what it prints."""
    package = _install_wheel(tmp_path_factory.mktemp("build"), tmp_path_factory.mktemp("installed"))
    folder = tmp_path_factory.mktemp("empty")

    def run(*arguments: str) -> str:
        return _output([str(package / "bin" / "fgpt"), *arguments], cwd=folder, package=package)

    imported = _output([sys.executable, "-c", "import fgpt_hf; print(fgpt_hf.__file__)"], cwd=folder, package=package)
    assert Path(imported.strip()) == package / "fgpt_hf" / "__init__.py"
    return run


def _install_wheel(build: Path, package: Path) -> Path:
    """Build the wheel from a copy of the repository, and unpack it into a folder of its own, without dependencies."""
    for name in BUILT_FROM:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, build / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(ROOT / name, build / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    _output([*pip, "wheel", "--no-deps", "--no-build-isolation", ".", "--wheel-dir", "dist"], cwd=build)
    (wheel,) = (build / "dist").glob("*.whl")
    _output([*pip, "install", "--no-deps", "--no-index", "--target", str(package), str(wheel)], cwd=build)
    return package


def _output(command: list[str], cwd: Path, package: Path | None = None) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    environment.pop("PYTHONPATH", None)
    if package:
        environment["PYTHONPATH"] = str(package)
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_an_installed_wheel_trains_chats_and_publishes(fgpt: Command) -> None:
    assert "3 steps" in fgpt("train-base", "--preset", "quickstart", "--max_steps", "3", "--output_dir", "base")
    assert fgpt("chat", "base", "Hello", "--greedy", "--max_new_tokens", "4").endswith("\n")
    listed = fgpt("publish", "base", "user/name", "--dry_run", "--space", "user/chat")
    model, space = listed.split("and to its Space user/chat")
    assert "modeling_fgpt.py" in model and "README.md" in model
    assert {path.name for path in (ROOT / "space").iterdir() if path.is_file()} <= set(space.split())
