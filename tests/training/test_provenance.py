"""Where a model comes from: recorded by the process that writes, and only what is true of it."""

import json
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest
from accelerate import Accelerator

from fgpt_hf.config.runs import BaseRun, InstructRun
from fgpt_hf.runtime.hardware import device_name
from fgpt_hf.training import run_folder
from fgpt_hf.training.run_folder import PROVENANCE, RunFolder, record_provenance

ORIGIN = {"data": {"train": {"documents": 3, "tokens": 70}}}


def recorded(folder: Path, rank: int = 0) -> dict | None:
    folder.mkdir(exist_ok=True)
    record_provenance(RunFolder(BaseRun(output_dir=str(folder)), rank), Accelerator(cpu=True), ORIGIN)
    file = folder / PROVENANCE
    return json.loads(file.read_text()) if file.is_file() else None


def test_data_machine_and_software_are_recorded_by_the_first_process_alone(tmp_path: Path) -> None:
    found = recorded(tmp_path / "run")
    assert found["data"] == ORIGIN["data"] and found["processes"] == 1
    assert found["device"] == device_name(Accelerator(cpu=True).device)
    assert found["versions"]["torch"] == version("torch")
    assert recorded(tmp_path / "other", rank=1) is None


def test_what_lies_on_this_machine_is_recorded_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("runs/base", "mine/rows"):
        Path(name).mkdir(parents=True)
    run = InstructRun(model_name_or_path="runs/base", dataset_name="mine/rows*2,somebody/pairs", output_dir="run")
    Path("run").mkdir()
    record_provenance(RunFolder(run, 0), Accelerator(cpu=True), {})
    assert json.loads((Path("run") / PROVENANCE).read_text())["local"] == ["runs/base", "mine/rows"]


@pytest.mark.parametrize("state", ["clean", "changed", "another's", "none"])
def test_a_commit_is_named_only_if_it_is_this_codes_own(state: str, tmp_path: Path, monkeypatch) -> None:
    code = tmp_path / "code" / "provenance.py"
    code.parent.mkdir()
    code.write_text("one")
    git = ["git", "-C", str(code.parent), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    if state != "none":
        subprocess.run([*git, "init", "-q"], check=True)
        (code.parent / "tracked").write_text("one")
        subprocess.run([*git, "add", "tracked", *(["provenance.py"] if state != "another's" else [])], check=True)
        subprocess.run([*git, "commit", "-q", "-m", "one"], check=True)
    if state == "changed":
        code.write_text("two")
    monkeypatch.setattr(run_folder, "__file__", str(code))
    commit = recorded(tmp_path / "run").get("commit")
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert commit == (head if state == "clean" else None)
