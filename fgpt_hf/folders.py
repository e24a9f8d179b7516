"""What a run writes: folders that are whole or not there, and lines that belong to a step."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from fgpt_hf.runs import Run

MANIFEST = "manifest.json"
RECORD = "run.yaml"
RESULTS = "results.json"
PARTIAL = ".partial"  # the ending of a folder that is being written, or replaced


class RunFolder:
    """`run.yaml`, `metrics.jsonl`, `samples.jsonl`, `figures/`, `checkpoints/` and `model/` of one run.

    While it is open no other process can open it. Only the process with rank 0 writes.
    """

    def __init__(self, run: Run, rank: int = 0) -> None:
        self.run, self.path, self.is_writer = run, run.folder, rank == 0
        self.checkpoints = self.path / "checkpoints"
        self.model = self.path / "model"
        self.record = self.path / RECORD

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Hold the folder for this run; nothing in it changes before `begin`.

        Raises:
            ValueError: it holds a run and none was to be resumed or overwritten; it holds another run than the one to
                be resumed; another process is writing to it.
        """
        if not self.is_writer:
            yield
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.path.with_name(f".{self.path.name}.lock"), timeout=0):
                self._check()
                yield
        except Timeout as error:
            raise ValueError(f"{self.path} is being written to by another run: choose another output_dir") from error

    def begin(self) -> None:
        """Make the folder of a new run, in place of the one that was to be overwritten; record the run."""
        if self.is_writer:
            if self.run.resume_from_checkpoint is None and self.record.is_file():
                shutil.rmtree(self.path)
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            for unfinished in self.path.glob(f"*{PARTIAL}"):
                shutil.rmtree(unfinished, ignore_errors=True)
            self.record_run()

    def record_run(self) -> None:
        """Write the run as it now is to `run.yaml`."""
        if self.is_writer:
            _write_whole(self.record, self.run.to_yaml())

    def append(self, name: str, line: Mapping[str, Any]) -> None:
        """Add a line to `metrics.jsonl` or `samples.jsonl`; it holds the step that it belongs to."""
        if self.is_writer:
            with (self.path / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def forget_after(self, step: int) -> None:
        """Drop the lines of later steps, which a resumed run will write again."""
        for path in (self.path / "metrics.jsonl", self.path / "samples.jsonl") if self.is_writer else ():
            kept = [line for line in read_lines(path) if line["step"] <= step]
            _write_whole(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))

    def _check(self) -> None:
        if self.run.resume_from_checkpoint is not None:
            if not self.record.is_file():
                raise ValueError(f"{self.path} holds no run to resume: output_dir must be the folder of one")
            self._compare(read_record(self.record))
        elif self.record.is_file() and not self.run.overwrite_output_dir:
            raise ValueError(
                f"{self.path} already holds a run: continue it with --resume_from_checkpoint latest, replace it with "
                "--overwrite_output_dir, or choose another --output_dir"
            )

    def _compare(self, recorded: Mapping[str, Any]) -> None:
        for name in self.run.lasting:
            if recorded.get(name) != getattr(self.run, name):
                raise ValueError(
                    f"{self.path} holds a run with {name}={recorded.get(name)}, which cannot go on with "
                    f"{name}={getattr(self.run, name)}: resume with the recorded value, or choose another output_dir"
                )


def read_record(path: Path) -> dict[str, Any]:
    """The values of a `run.yaml`; ValueError where it is damaged."""
    try:
        recorded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        recorded = None
    if not isinstance(recorded, dict):
        raise ValueError(f"{path} is damaged: it should hold the run's values, a line for each")
    return recorded


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file, of which a killed process may have left the last one unfinished."""
    lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
    return [json.loads(line) for line in lines[:-1]]


def model_folder(path: Path) -> Path:
    """The folder that holds the model, or its adapter: `path` itself, or `model/` in it where `path` is a run's folder.

    Raises:
        ValueError: neither holds a model.
    """
    for folder in (path, path / "model"):
        is_described = any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))
        if is_described and any(folder.glob("*.safetensors")):
            return folder
    raise ValueError(f"{path} is not a model's folder: neither it nor its model/ holds config.json and *.safetensors")


def model_name(name: str) -> str:
    """The model's folder where `name` is a run's, or `name` itself: a model's folder, or its id on the Hub."""
    is_run = not Path(name, "config.json").is_file() and Path(name, "model").is_dir()
    return str(Path(name, "model")) if is_run else name


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder to write into: it becomes `folder` when the block ends well and disappears when it fails.

    It is flushed to the disk first, so a process that is killed at any moment leaves what was there before, or all of
    the new.
    """
    partial, replaced = (folder.with_name(f"{folder.name}{mark}{PARTIAL}") for mark in ("", ".replaced"))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in (*_files(partial), *filter(Path.is_dir, partial.rglob("*")), partial):
            _flush(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if folder.exists():
        folder.rename(replaced)
    partial.rename(folder)
    _flush(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def write_manifest(folder: Path) -> None:
    """Record the hashes of a folder's files, for `flaw`."""
    manifest = {path.relative_to(folder).as_posix(): _sha256(path) for path in _files(folder)}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def flaw(folder: Path) -> str | None:
    """What is wrong with a folder that has a manifest, or None if every file is as it was written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"{MANIFEST} is missing or damaged"
    for name, digest in manifest.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if _sha256(folder / name) != digest:
            return f"{name} is damaged"
    return None


def _write_whole(path: Path, text: str) -> None:
    """Replace a file's text, or none of it if the process is killed meanwhile."""
    partial = path.with_name(f"{path.name}{PARTIAL}")
    partial.write_text(text, encoding="utf-8")
    _flush(partial)
    partial.replace(path)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows has no such call for folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
