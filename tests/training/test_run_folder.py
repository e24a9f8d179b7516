"""A run's folder keeps its record, and names what is damaged."""

import errno
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fgpt_hf.config.presets import PRESETS
from fgpt_hf.errors import UserError
from fgpt_hf.files import read_json_lines, write_manifest
from fgpt_hf.runtime.plan import TrainingPlan
from fgpt_hf.training.checkpoints import checkpoints, latest_valid_checkpoint, rotate, set_aside_after
from fgpt_hf.training.run_folder import RunFolder


@pytest.mark.parametrize("text", ["", "preset: [", "a line"])
def test_a_damaged_record_of_a_run_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.yaml").write_text(text)
    run = replace(PRESETS["quickstart"], output_dir=str(tmp_path / "run"), resume_from_checkpoint="latest")
    with pytest.raises(ValueError, match="run.yaml is damaged"), RunFolder(run).opened():
        pass


def test_a_record_that_cannot_be_written_is_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(replace(PRESETS["quickstart"], output_dir=str(tmp_path / "run")))
    plan = TrainingPlan(max_steps=5, rows=8, micro_batches=2)
    folder.begin(plan)
    before = folder.record.read_text()

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError):
        folder.record_run(plan.with_rows(4))
    assert folder.record.read_text() == before


def write_checkpoints(folder: Path, *steps: int) -> list[Path]:
    paths = [folder / f"step_{step:08d}" for step in steps]
    for path in paths:
        path.mkdir(parents=True)
        (path / "weights").write_text(path.name)
        write_manifest(path)
    return paths


def names(paths: Iterable[Path]) -> list[str]:
    return [path.name for path in paths]


def test_rotation_keeps_the_newest_and_sweeps_what_was_left_unfinished(tmp_path: Path) -> None:
    *_, written = write_checkpoints(tmp_path, 5, 20, 3, 100)
    (tmp_path / "step_00000200.partial").mkdir()
    (tmp_path / "notes").mkdir()
    rotate(tmp_path, keep=2, written=written)
    assert names(checkpoints(tmp_path)) == ["step_00000100", "step_00000020"]
    assert sorted(names(tmp_path.iterdir())) == ["notes", "step_00000020", "step_00000100"]


@pytest.mark.parametrize("keep", [1, 2])
def test_rotation_never_deletes_the_checkpoint_just_written(tmp_path: Path, keep: int) -> None:
    """Even where someone put later ones beside it."""
    *_, written = write_checkpoints(tmp_path, 16, 18, 15)
    rotate(tmp_path, keep, written)
    assert names(checkpoints(tmp_path)) == ["step_00000018", "step_00000015"][2 - keep :]


def test_checkpoints_of_a_branch_that_is_left_are_set_aside_and_never_replaced(tmp_path: Path) -> None:
    write_checkpoints(tmp_path, 14, 16, 18)
    assert len(set_aside_after(tmp_path, 14)) == 2 and names(checkpoints(tmp_path)) == ["step_00000014"]
    write_checkpoints(tmp_path, 16)
    set_aside_after(tmp_path, 14)
    assert sorted(names((tmp_path / "abandoned").iterdir())) == ["step_00000016", "step_00000016.2", "step_00000018"]
    assert set_aside_after(tmp_path, 14) == [] and sorted(names(tmp_path.iterdir())) == ["abandoned", "step_00000014"]


@pytest.mark.parametrize("moves", [0, 1])
def test_killed_while_it_sets_aside_a_run_does_not_take_the_branch_that_it_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: int
) -> None:
    write_checkpoints(tmp_path, 14, 16, 18)
    rename = Path.rename
    moved: list[Path] = []

    def rename_or_die(path: Path, target: Path) -> Path:
        if path.name.startswith("step_"):
            if len(moved) == moves:
                raise KeyboardInterrupt
            moved.append(path)
        return rename(path, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", rename_or_die)
        set_aside_after(tmp_path, 14)
    assert latest_valid_checkpoint(tmp_path) == tmp_path / "step_00000014"
    set_aside_after(tmp_path, 14)
    assert sorted(names((tmp_path / "abandoned").iterdir())) == ["step_00000016", "step_00000018"]
    write_checkpoints(tmp_path, 20)
    assert latest_valid_checkpoint(tmp_path) == tmp_path / "step_00000020"


def resumed(folder: Path, **changes: Any) -> RunFolder:
    return RunFolder(
        replace(PRESETS["quickstart"], output_dir=str(folder), **{"resume_from_checkpoint": "latest", **changes})
    )


PLAN = TrainingPlan(max_steps=5, rows=8, micro_batches=2)


def test_a_run_that_was_killed_between_its_last_save_and_the_rotation_keeps_no_more_than_it_should(
    tmp_path: Path,
) -> None:
    folder = resumed(tmp_path / "run", save_total_limit=2)
    write_checkpoints(folder.checkpoints, 3, 4, 5)
    (folder.checkpoints / "step_00000005.replaced.partial").mkdir()
    folder.begin(PLAN, resumed_at=5)
    assert sorted(names(folder.checkpoints.iterdir())) == ["step_00000004", "step_00000005"]


def test_latest_where_nothing_was_saved_starts_the_run_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The first start of a batch job that always resumes, and one after a kill before the first checkpoint."""
    caplog.set_level("INFO")
    for _ in range(2):
        folder = resumed(tmp_path / "run")
        with folder.opened():
            assert folder.checkpoint is None
            folder.begin(PLAN)
            folder.append_metrics({"step": 0})
        assert "run holds no checkpoint yet: the run starts from its first step" in caplog.text
        assert len(read_json_lines(folder.path / "metrics.jsonl")) == 1
        (folder.checkpoints / "step_00000003.partial").mkdir(exist_ok=True)
        caplog.clear()


def test_latest_never_replaces_another_run_or_a_model_or_damaged_checkpoints(tmp_path: Path) -> None:
    folder = resumed(tmp_path / "run")
    folder.begin(PLAN)
    with (
        pytest.raises(UserError, match="which cannot continue with seed=5"),
        resumed(tmp_path / "run", seed=5).opened(),
    ):
        pass
    folder.model.mkdir()
    with pytest.raises(UserError, match="holds a model but no checkpoint"), resumed(tmp_path / "run").opened():
        pass
    (damaged,) = write_checkpoints(folder.checkpoints, 3)
    (damaged / "weights").write_text("damaged")
    with pytest.raises(UserError, match="holds no complete checkpoint"), resumed(tmp_path / "run").opened():
        pass


def test_a_path_that_is_not_a_checkpoint_of_the_run_is_an_error(tmp_path: Path) -> None:
    folder = resumed(tmp_path / "run")
    folder.begin(PLAN)
    (foreign,) = write_checkpoints(tmp_path / "other", 3)
    for path, said in {tmp_path / "nowhere": "there is no such folder", foreign: "a checkpoint of its own"}.items():
        again = resumed(tmp_path / "run", resume_from_checkpoint=str(path))
        with pytest.raises(UserError, match=said), again.opened():
            pass
        assert not folder.model.exists()


def test_checkpoints_without_a_record_are_not_resumed(tmp_path: Path) -> None:
    write_checkpoints(tmp_path / "run" / "checkpoints", 3)
    with pytest.raises(UserError, match="holds checkpoints but no run.yaml"), resumed(tmp_path / "run").opened():
        pass


def test_a_run_that_was_to_be_overwritten_leaves_nothing_to_resume_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle of the deletion, too."""
    folder = resumed(tmp_path / "run")
    folder.begin(PLAN)
    write_checkpoints(folder.checkpoints, 3, 6)
    (folder.path / "notes.txt").write_text("of the run before")
    again = resumed(tmp_path / "run", resume_from_checkpoint=None, overwrite_output_dir=True)

    def killed(*given: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), again.opened():
        patch.setattr("shutil.rmtree", killed)
        patch.setattr(Path, "unlink", killed)
        again.begin(PLAN)
    with resumed(tmp_path / "run").opened():
        assert resumed(tmp_path / "run").checkpoint is None
    with again.opened():
        again.begin(PLAN)
    assert sorted(names(folder.path.iterdir())) == ["checkpoints", "run.yaml"] and not list(
        folder.checkpoints.iterdir()
    )


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system that takes no files")
def test_a_folder_that_cannot_be_written_to_is_not_said_to_be_in_use() -> None:
    run = replace(PRESETS["quickstart"], output_dir="/proc/run")
    with pytest.raises(OSError, match="no file can be created there.*'/proc'"), RunFolder(run).opened():
        pass


def test_a_file_is_no_folder_for_a_run(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("notes")
    with pytest.raises(UserError, match="run is a file: give a folder"), resumed(tmp_path / "run").opened():
        pass
    assert (tmp_path / "run").read_text() == "notes"
