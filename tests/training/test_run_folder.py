"""Folders are whole or not there, whatever happens while they are written."""

import errno
from dataclasses import replace
from pathlib import Path

import pytest

from fgpt_hf.config.presets import PRESETS
from fgpt_hf.files import atomic_directory, integrity_error, read_lines, write_manifest
from fgpt_hf.training.checkpoints import checkpoints, rotate
from fgpt_hf.training.run_folder import RunFolder


def write(folder: Path, content: str = "new") -> None:
    with atomic_directory(folder) as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "file").write_text(content)
        write_manifest(partial)


def test_a_folder_appears_whole_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    write(tmp_path / "folder")
    assert integrity_error(tmp_path / "folder") is None
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_what_fails_leaves_what_was_there(tmp_path: Path, error: BaseException) -> None:
    write(tmp_path / "folder", "old")
    with pytest.raises(type(error)), atomic_directory(tmp_path / "folder") as partial:
        (partial / "file").write_text("new")
        raise error
    assert (tmp_path / "folder" / "inner" / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    write(tmp_path / "folder", "old")
    write(tmp_path / "folder", "new")
    assert (tmp_path / "folder" / "inner" / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize(
    ("damage", "answer"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing or damaged"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json is missing or damaged"),
        (lambda folder: (folder / "inner" / "file").unlink(), "inner/file is missing"),
        (lambda folder: (folder / "inner" / "file").write_text("nev"), "inner/file is damaged"),
    ],
)
def test_every_damage_is_named(tmp_path: Path, damage, answer: str) -> None:
    write(tmp_path / "folder")
    damage(tmp_path / "folder")
    assert integrity_error(tmp_path / "folder") == answer


@pytest.mark.parametrize("text", ["", "preset: [", "a line"])
def test_a_damaged_record_of_a_run_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.yaml").write_text(text)
    run = replace(PRESETS["quickstart"], output_dir=str(tmp_path / "run"), resume_from_checkpoint="latest")
    with pytest.raises(ValueError, match="run.yaml is damaged"), RunFolder(run).opened():
        pass


def test_a_record_that_cannot_be_written_is_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(replace(PRESETS["quickstart"], output_dir=str(tmp_path / "run")))
    folder.begin()
    before = folder.record.read_text()

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    folder.run.max_steps += 1
    with pytest.raises(OSError):
        folder.record_run()
    assert folder.record.read_text() == before


def test_rotation_keeps_the_newest_and_sweeps_what_was_left_unfinished(tmp_path: Path) -> None:
    for step in (5, 100, 20, 3):
        write(tmp_path / f"step_{step:08d}")
    (tmp_path / "step_00000200.partial").mkdir()
    (tmp_path / "notes").mkdir()
    rotate(tmp_path, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000100", "step_00000020"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "step_00000020", "step_00000100"]


def test_an_unfinished_last_line_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "lines.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert read_lines(tmp_path / "lines.jsonl") == [{"step": 1}, {"step": 2}]
    assert read_lines(tmp_path / "nowhere.jsonl") == []
