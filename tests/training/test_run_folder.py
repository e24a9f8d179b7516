"""A run's folder keeps its record, and names what is damaged."""

import errno
from dataclasses import replace
from pathlib import Path

import pytest

from fgpt_hf.config.presets import PRESETS
from fgpt_hf.files import write_manifest
from fgpt_hf.runtime.plan import TrainingPlan
from fgpt_hf.training.checkpoints import checkpoints, rotate
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


def test_rotation_keeps_the_newest_and_sweeps_what_was_left_unfinished(tmp_path: Path) -> None:
    for step in (5, 100, 20, 3):
        (tmp_path / f"step_{step:08d}").mkdir()
        write_manifest(tmp_path / f"step_{step:08d}")
    (tmp_path / "step_00000200.partial").mkdir()
    (tmp_path / "notes").mkdir()
    rotate(tmp_path, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000100", "step_00000020"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "step_00000020", "step_00000100"]
