"""A run ends with what it reached and what to type next, and a stage without the one before says what comes first."""

import shlex
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from fgpt_hf.config.parser import parse_run
from fgpt_hf.config.presets import INSTRUCT_PRESETS, PREFERENCE_PRESETS, PRESETS
from fgpt_hf.config.runs import InstructRun, PreferenceRun, Run
from fgpt_hf.errors import UserError
from fgpt_hf.report.next_steps import fgpt_command, next_steps, require_start
from tests.support.forked import run_command


def commands(run: Run, folder: Path) -> list[str]:
    (folder / "model").mkdir(parents=True, exist_ok=True)
    return [step.command for step in next_steps(folder, asdict(run))]


def test_each_stage_names_the_next_one_as_it_can_be_typed(tmp_path: Path) -> None:
    folder = tmp_path / "my runs" / "base"
    (chat, instruct, report) = commands(PRESETS["quickstart"], folder)
    arguments = shlex.split(instruct)
    run = parse_run(InstructRun, INSTRUCT_PRESETS, arguments[arguments.index("train-instruct") + 1 :])
    assert run.model_name_or_path == str(folder) and run.folder == tmp_path / "my runs" / "instruct"
    assert run.dataset_name == INSTRUCT_PRESETS["quickstart"].dataset_name
    assert " chat " in chat and "--html" in report

    *_, preference, _, publish = commands(INSTRUCT_PRESETS["quickstart"], run.folder)
    arguments = shlex.split(preference)
    last = parse_run(PreferenceRun, PREFERENCE_PRESETS, arguments[arguments.index("train-preference") + 1 :])
    assert last.folder == tmp_path / "my runs" / "preference"
    assert "--space user/name-chat" in publish
    assert not any("train-" in command for command in commands(PREFERENCE_PRESETS["quickstart"], last.folder))


def test_who_trained_on_own_text_is_asked_for_own_conversations(tmp_path: Path) -> None:
    own = replace(PRESETS["fgpt-124m"], dataset_name="novels")
    _, instruct, _ = commands(own, tmp_path / "novels")
    assert "--preset quickstart" in instruct and "--dataset_name my_chats.jsonl" in instruct
    assert instruct.endswith("novels-instruct")


def test_a_stage_without_the_one_before_says_what_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="Train it first: .*train-base --preset quickstart --output_dir runs/mine"):
        require_start(InstructRun(preset="quickstart", model_name_or_path="runs/mine"))
    with pytest.raises(UserError, match="Train it first: .*train-instruct --preset quickstart --output_dir /nowhere"):
        require_start(PreferenceRun(preset="quickstart", model_name_or_path="/nowhere"))
    Path("runs/mine").mkdir(parents=True)
    Path("runs/mine/run.yaml").touch()
    with pytest.raises(UserError, match="is a run that has no model yet"):
        require_start(InstructRun(model_name_or_path="runs/mine"))
    Path("runs/mine/model").mkdir()
    for run in (
        InstructRun(model_name_or_path="runs/mine"),
        InstructRun(model_name_or_path="user/name"),
        PRESETS["fgpt-124m"],
    ):
        require_start(run)


@pytest.mark.slow
def test_the_command_answers_in_one_line(tmp_path: Path) -> None:
    done = run_command("train_instruct.py", "--preset=quickstart", cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert "train-base --preset quickstart --output_dir runs/quickstart/base" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_command_is_found_where_it_is_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.executable", str(tmp_path / ".venv" / "bin" / "python"))
    assert fgpt_command("chat", "runs/mine") == "python -m fgpt_hf chat runs/mine"
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "fgpt").touch()
    assert fgpt_command("chat", "runs/mine") == ".venv/bin/fgpt chat runs/mine"
