"""`fgpt publish --space`: the Space serves the very commit that was published, and both name each other."""

import json
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest
from huggingface_hub import SpaceCard

from fgpt_hf.cli import main
from tests.support.loopback_hub import LoopbackHub
from tests.support.run_folders import write_run

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "quickstart", model_name_or_path="tester/base")


@pytest.fixture
def base(server: LoopbackHub) -> str:
    """The name and the commit of the base model."""
    return f"tester/base@{server.add_repo('model', 'tester/base', {'model.safetensors': b'x'}).at().oid}"


def test_the_space_has_the_models_names_and_commits_in_it(
    run: Path, base: str, server: LoopbackHub, capsys: pytest.CaptureFixture[str]
) -> None:
    main.run(["publish", str(run), "tester/tiny", "--space", "tester/chat"])
    model, space = server.repo("model", "tester/tiny"), server.repo("space", "tester/chat")
    files = space.files()
    assert json.loads(files["models.json"]) == {"MODEL_ID": f"tester/tiny@{model.at().oid}", "BASE_MODEL_ID": base}
    assert {path.name for path in (ROOT / "space").iterdir() if path.is_file()} | {"models.json"} <= files.keys()
    assert space.sdk == "gradio" and space.at().oid in capsys.readouterr().out
    card = SpaceCard(files["README.md"].decode())
    assert card.data.models == ["tester/tiny", "tester/base"] and card.data.sdk_version and card.data.title == "tiny"  # type: ignore[attr-defined]
    assert card.data["preload_from_hub"][0] == f"tester/tiny model.safetensors {model.at().oid}"
    assert "https://huggingface.co/tester/tiny" in card.text
    assert "https://huggingface.co/spaces/tester/chat" in model.files()["README.md"].decode()
    assert model.files()["metrics.jsonl"] == (run / "metrics.jsonl").read_bytes()


def test_the_same_again_changes_nothing_and_a_new_revision_updates_the_space(
    run: Path, base: str, server: LoopbackHub
) -> None:
    for _ in range(2):
        main.run(["publish", str(run), "tester/tiny", "--space", "tester/chat"])
    space = server.repo("space", "tester/chat")
    assert len(space.history()) == 2  # the Hub's own first commit, and the Space
    space.add({"old_module.py": "", "notes.md": "mine"})
    main.run(["publish", str(run), "tester/tiny", "--space", "tester/chat", "--revision", "next", "--license", "mit"])
    files = space.files()
    assert (
        json.loads(files["models.json"])["MODEL_ID"]
        == f"tester/tiny@{server.repo('model', 'tester/tiny').at('next').oid}"
    )
    assert "old_module.py" not in files and files["notes.md"] == b"mine"


def test_pip_takes_the_cpu_wheel_of_torch_for_the_space(
    run: Path, base: str, server: LoopbackHub, tmp_path: Path
) -> None:
    main.run(["publish", str(run), "tester/tiny", "--space", "tester/chat"])
    requirements = server.repo("space", "tester/chat").files()["requirements.txt"].decode()
    lines = [line for line in requirements.splitlines() if not line.startswith("#")]
    assert lines[0] == "--extra-index-url https://download.pytorch.org/whl/cpu"
    for pin in lines[1:]:
        write_wheel(tmp_path / "pypi", *pin.split("=="))
    write_wheel(tmp_path / "cpu", "torch", f"{dict(pin.split('==') for pin in lines[1:])['torch']}+cpu")
    needed = tmp_path / "requirements.txt"
    needed.write_text("\n".join([f"--extra-index-url {(tmp_path / 'cpu').as_uri()}", *lines[1:]]))
    pip = [sys.executable, "-m", "pip", "--isolated", "install", "--dry-run", "--ignore-installed", "--quiet"]
    options = ["--report", "-", "--index-url", (tmp_path / "pypi").as_uri(), "-r", str(needed)]
    report = json.loads(subprocess.run([*pip, *options], check=True, capture_output=True, text=True).stdout)
    versions = {chosen["metadata"]["name"]: chosen["metadata"]["version"] for chosen in report["install"]}
    assert versions["torch"].endswith("+cpu") and len(versions) == len(lines) - 1


def write_wheel(index: Path, name: str, version: str) -> None:
    """Put an empty package into an index that pip reads."""
    wheel = index / name.replace("_", "-") / f"{name}-{version}-py3-none-any.whl"
    wheel.parent.mkdir(parents=True)
    with ZipFile(wheel, "w") as archive:
        info = f"{name}-{version}.dist-info"
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    (wheel.parent / "index.html").write_text(f'<a href="{wheel.name}">{wheel.name}</a>')


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--space", "chat"], "'chat' cannot be a repo's name: give user/name"),
        (["--space", "somebody/chat"], "the token may not write there"),
        (["--space", "tester/chat", "--base_model", "tester/none"], "tester/none: the Hub refuses with 404"),
    ],
)
def test_what_cannot_be_a_space_is_refused_in_one_line(
    arguments: list[str], problem: str, run: Path, base: str, server: LoopbackHub
) -> None:
    with pytest.raises(ValueError, match=problem):
        main.run(["publish", str(run), "tester/tiny", *arguments])
    assert ("model", "tester/tiny") not in server.endpoints.repos or "README.md" not in server.repo(
        "model", "tester/tiny"
    ).files()


def test_a_dry_run_shows_the_files_of_both_and_asks_nothing(
    run: Path, base: str, server: LoopbackHub, capsys: pytest.CaptureFixture[str]
) -> None:
    main.run(["publish", str(run), "tester/tiny", "--space", "tester/chat", "--dry_run"])
    model, space = capsys.readouterr().out.split("and to its Space tester/chat")
    assert "model.safetensors" in model and "app.py" not in model
    assert "app.py" in space and "models.json" in space and "model.safetensors" not in space
    assert server.endpoints.repos.keys() == {("model", "tester/base")}
    with pytest.raises(ValueError, match="'chat' cannot be a repo's name"):
        main.run(["publish", str(run), "tester/tiny", "--space", "chat", "--dry_run"])


def test_without_the_files_of_the_space_nothing_is_published(
    run: Path, base: str, server: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fgpt_hf.hub.space.SOURCES", [tmp_path / "space"])
    with pytest.raises(ValueError, match="the Space's files are missing from .*: install fgpt-hf again"):
        main.run(["publish", str(run), "tester/tiny", "--space", "tester/chat"])
    assert ("model", "tester/tiny") not in server.endpoints.repos


def test_a_private_model_gets_a_private_space(run: Path, base: str, server: LoopbackHub) -> None:
    main.run(["publish", str(run), "tester/tiny", "--space", "tester/chat", "--private"])
    assert server.repo("space", "tester/chat").private
