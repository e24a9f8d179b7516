"""The built wheel does all that a clone does: it trains, chats and publishes, in an empty environment and folder."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILT_FROM = ("fgpt_hf", "space", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md")
SCRIPTS = ("train_base.py", "train_instruct.py", "train_preference.py")


class Environment:
    """An empty virtual environment with the present one's packages behind it, so that none is downloaded."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, symlinks=os.name != "nt")
        scripts = "Scripts" if os.name == "nt" else "bin"
        self.folder, self.scripts = folder, folder / scripts
        (own,) = folder.rglob("site-packages")
        # Of a folder that is named so, Python reads no .pth file: an editable install of FGPT stays unseen.
        (own / "others.pth").write_text(sysconfig.get_path("purelib"))

    def install(self, package: Path) -> None:
        pip = [sys.executable, "-m", "pip", "--python", str(self.folder), "--quiet", "--disable-pip-version-check"]
        output([*pip, "install", "--no-deps", "--no-index", "--no-build-isolation", str(package)], cwd=self.folder)

    def run(self, program: str, *arguments: str, cwd: Path) -> str:
        return output([str(self.scripts / program), *arguments], cwd=cwd)


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sdist, and the wheel that is built from it, by their endings."""
    source = tmp_path_factory.mktemp("source")
    for name in (*BUILT_FROM, *SCRIPTS):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(ROOT / name, source / name)
    output([sys.executable, "-m", "build", "--no-isolation", "."], cwd=source)
    (sdist,), (wheel,) = (source / "dist").glob("*.tar.gz"), (source / "dist").glob("*.whl")
    return {"sdist": sdist, "wheel": wheel}


@pytest.fixture(scope="module")
def environment(distributions: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with the wheel in it."""
    environment = Environment(tmp_path_factory.mktemp("environment"))
    environment.install(distributions["wheel"])
    return environment


def output(command: list[str], cwd: Path) -> str:
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    variables.pop("PYTHONPATH", None)
    done = subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_an_installed_wheel_trains_chats_and_publishes(environment: Environment, tmp_path: Path) -> None:
    def fgpt(*arguments: str) -> str:
        return environment.run("fgpt", *arguments, cwd=tmp_path)

    imported = environment.run("python", "-c", "import fgpt_hf; print(fgpt_hf.__file__)", cwd=tmp_path)
    assert Path(imported.strip()).is_relative_to(environment.folder)
    (tmp_path / "text.txt").write_text("<|endoftext|>\n".join(f"Document {n} is {n * 7} long.\n" for n in range(900)))
    network = ["--hidden_size=32", "--num_hidden_layers=1", "--num_attention_heads=2", "--max_position_embeddings=96"]
    data = ["--dataset_name=text.txt", "--max_steps=3", "--eval_tasks=", "--output_dir=base"]
    assert "3 steps" in fgpt("train-base", "--preset=quickstart", *network, *data)
    assert fgpt("chat", "base", "Hello", "--greedy", "--max_new_tokens", "4").endswith("\n")
    listed = fgpt("publish", "base", "user/name", "--dry_run", "--space", "user/chat")
    model, space = listed.split("and to its Space user/chat")
    assert "modeling_fgpt.py" in model and "README.md" in model
    assert {path.name for path in (ROOT / "space").iterdir() if path.is_file()} <= set(space.split())


@pytest.mark.slow
def test_an_installed_sdist_is_the_same_package(
    distributions: dict[str, Path], environment: Environment, tmp_path: Path
) -> None:
    other = Environment(tmp_path / "other")
    other.install(distributions["sdist"])
    version = environment.run("fgpt", "--version", cwd=tmp_path)
    assert other.run("fgpt", "--version", cwd=tmp_path) == version
    assert package_files(other) == package_files(environment)


def package_files(environment: Environment) -> dict[str, bytes]:
    (package,) = environment.folder.rglob("site-packages/fgpt_hf")
    paths = [path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {path.relative_to(package).as_posix(): path.read_bytes() for path in paths}


@pytest.mark.slow
def test_both_hold_every_file_of_the_package_and_of_the_space(distributions: dict[str, Path]) -> None:
    tracked = [path for path in (ROOT / "fgpt_hf").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    package = {path.relative_to(ROOT).as_posix() for path in tracked}
    space = {path.name for path in (ROOT / "space").iterdir() if path.is_file()}
    with zipfile.ZipFile(distributions["wheel"]) as wheel:
        names = set(wheel.namelist())
    assert package <= names and {f"fgpt_hf/hub/space_files/{name}" for name in space} <= names
    assert all(name.startswith(("fgpt_hf/", "fgpt_hf-")) for name in names)
    with tarfile.open(distributions["sdist"]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert package | {f"space/{name}" for name in space} | {*SCRIPTS, *BUILT_FROM} <= names
