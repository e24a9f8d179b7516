"""Where a model comes from: recorded by the process that writes, and only what is true of it."""

import json
import subprocess
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import pytest
from accelerate import Accelerator

from fgpt_hf.config.runs import BaseRun, InstructRun
from fgpt_hf.data.sources import DataProvenance
from fgpt_hf.data.splits import SplitSize
from fgpt_hf.model.configuration_fgpt import FGPTConfig
from fgpt_hf.model.own_code import network_code_hash
from fgpt_hf.runtime.hardware import device_name
from fgpt_hf.runtime.network import flops_per_token, network_config
from fgpt_hf.training import provenance
from fgpt_hf.training.provenance import record_provenance
from fgpt_hf.training.records import PROVENANCE
from fgpt_hf.training.run_folder import RunFolder

DATA = DataProvenance({"train": SplitSize(documents=3, tokens=70)})


def recorded(folder: Path, rank: int = 0) -> dict | None:
    folder.mkdir(exist_ok=True)
    run = BaseRun(output_dir=str(folder))
    record_provenance(RunFolder(run, rank), Accelerator(cpu=True), DATA, network_config(run), 1000)
    file = folder / PROVENANCE
    return json.loads(file.read_text()) if file.is_file() else None


def test_data_machine_and_software_are_recorded_by_the_first_process_alone(tmp_path: Path) -> None:
    found = recorded(tmp_path / "run")
    assert found["data"]["train"] == asdict(DATA.sizes["train"]) and found["processes"] == 1
    assert found["device"] == device_name(Accelerator(cpu=True).device)
    assert found["versions"]["torch"] == version("torch")
    assert found["network_code_sha256"] == network_code_hash()
    assert found["training_flops"] == 1000 * flops_per_token(BaseRun(), network_config(BaseRun()))
    assert recorded(tmp_path / "other", rank=1) is None


@pytest.mark.parametrize("start", ["base", "base/model", "base/checkpoints/step_00000002"])
def test_the_run_before_is_recorded_with_the_one_that_starts_from_it(start: str, tmp_path: Path) -> None:
    recorded(tmp_path / "base")
    (tmp_path / "base" / "run.yaml").write_text(BaseRun().to_yaml())
    (tmp_path / "base" / "metrics.jsonl").write_text('{"step": 2, "tokens": 70, "seconds": 1.5}\n')
    (tmp_path / start).mkdir(parents=True, exist_ok=True)
    (tmp_path / "next").mkdir()
    run = InstructRun(model_name_or_path=str(tmp_path / start), output_dir=str(tmp_path / "next"))
    record_provenance(RunFolder(run), Accelerator(cpu=True), DataProvenance(), FGPTConfig(), 0)
    before = json.loads((tmp_path / "next" / PROVENANCE).read_text())["started_from"]
    assert before["run"]["dataset_name"] == BaseRun().dataset_name
    assert before["provenance"]["data"]["train"] == asdict(DATA.sizes["train"])
    assert before["last"] == {"step": 2, "tokens": 70, "seconds": 1.5}


def test_what_lies_on_this_machine_is_recorded_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("runs/base", "mine/rows"):
        Path(name).mkdir(parents=True)
    run = InstructRun(model_name_or_path="runs/base", dataset_name="mine/rows*2,somebody/pairs", output_dir="run")
    Path("run").mkdir()
    record_provenance(RunFolder(run, 0), Accelerator(cpu=True), DataProvenance(), FGPTConfig(), 0)
    assert json.loads((Path("run") / PROVENANCE).read_text())["local"] == ["runs/base", "mine/rows"]


@pytest.mark.parametrize("state", ["clean", "changed", "another's", "none"])
def test_a_commit_is_named_only_if_it_is_this_codes_own(
    state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    monkeypatch.setattr(provenance, "__file__", str(code))
    commit = recorded(tmp_path / "run").get("commit")
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert commit == (head if state == "clean" else None)
