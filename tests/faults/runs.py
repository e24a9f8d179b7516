"""The training scripts on a network and data so small that a whole run takes seconds, and ways to disturb them.

A script runs in a process that is forked from one with torch imported. Two processes are started by torchrun's own
agent, and talk through gloo.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any, Literal

import psutil

from fgpt_hf.cli.entry_point import command_line
from fgpt_hf.data import shard_writer, stream
from tests.support.forked import Forked
from tests.support.launched import torchrun

LONG = os.environ.get("FGPT_FAULTS") == "long"
SEED = int(os.environ.get("FGPT_FAULTS_SEED", "0"))

Script = Literal["train_base", "train_instruct", "train_preference", "prepare"]
SCHEDULE = {
    "max_steps": 6,
    "warmup_steps": 2,
    "learning_rate": 0.01,
    "save_steps": 1,
    "save_total_limit": 2,
    "eval_steps": 3,
    "sample_steps": 3,
    "logging_steps": 1,
    "max_eval_rows": 8,
    "gradient_accumulation_steps": 1,
    "bf16": "false",
}
NETWORK = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
BASE = {"preset": "quickstart", **NETWORK, **SCHEDULE, "dropout": 0.1, "eval_tasks": ""}
TUNING = {"preset": "quickstart", **SCHEDULE, "max_length": 64, "max_new_tokens": 4, "validation_prompts": 2}


@dataclass(frozen=True)
class Case:
    """A way to train.

    Attributes:
        script: the module of `fgpt_hf.cli`.
        data: a file or folder in the corpus of `tests/faults/conftest.py`.
        options: what differs from the schedule above; {corpus} stands for the corpus's folder.
    """

    name: str
    script: Script
    data: str
    options: tuple[str, ...] = ()
    processes: int = 1

    def flags(self, corpus: Path) -> list[str]:
        """Return the command line, less the run's folder."""
        if self.script == "prepare":
            fixed = {"dataset_name": corpus / self.data, "max_position_embeddings": 64, "validation_fraction": 0.1}
            return [*(f"--{name}={value}" for name, value in fixed.items()), *self._own(corpus)]
        fixed = BASE if self.script == "train_base" else TUNING | {"model_name_or_path": corpus / "model"}
        fixed = fixed | {"dataset_name": corpus / self.data, "per_device_train_batch_size": 4 // self.processes}
        return [*(f"--{name}={value}" for name, value in fixed.items()), *self._own(corpus)]

    def _own(self, corpus: Path) -> list[str]:
        return [option.format(corpus=corpus) for option in self.options]


STREAMED = ("--streaming", "--preprocessing_num_workers=1")
CASES = [
    Case("base, streamed", "train_base", "documents", STREAMED),
    Case("base, streamed, two processes", "train_base", "documents", STREAMED, processes=2),
    Case("base, streamed by worker processes", "train_base", "documents", ("--streaming",)),
    Case("base, prepared", "train_base", "rows", ("--eval_tasks=pydocs-choice={corpus}/choices.jsonl",)),
    Case("base, prepared, two processes", "train_base", "rows", processes=2),
    Case("base, prepared by the run itself", "train_base", "documents"),
    Case("instruct", "train_instruct", "chats.jsonl"),
    Case("instruct, two processes", "train_instruct", "chats.jsonl", processes=2),
    Case("instruct, adapters", "train_instruct", "chats.jsonl", ("--use_peft", "--lora_r=2", "--lora_dropout=0.1")),
    Case("preference", "train_preference", "pairs.jsonl"),
    Case("preference, two processes", "train_preference", "pairs.jsonl", processes=2),
]
PREPARE = Case("fgpt prepare", "prepare", "documents", ("--preprocessing_num_workers=1",))
PREPARE_IN_PROCESSES = Case(
    "fgpt prepare by worker processes", "prepare", "documents", ("--preprocessing_num_workers=2",)
)


def of_one_process(*short: str) -> list[Case]:
    """Return the cases of a single process: all in the long runs, and those of these names in the short ones."""
    return [case for case in (*CASES, PREPARE) if case.processes == 1 and (LONG or case.name in short)]


class Disturbed:
    """A script that runs for `case` and writes to `folder`, with its caches in the folder beside it.

    Args:
        fault: called in each process before the script starts.
        file_size_limit: the size past which a write fails, as on a full disk.
    """

    def __init__(
        self,
        case: Case,
        corpus: Path,
        folder: Path,
        *flags: str,
        fault: Callable[[], None] | None = None,
        file_size_limit: int | None = None,
        logs: Path | None = None,
    ) -> None:
        logs = logs or folder.parent / f"{folder.name}-logs"
        logs.mkdir(parents=True, exist_ok=True)
        self.script = case.script
        how = (case.script, caches_of(folder), fault)
        action = partial(_train, *how) if case.processes == 1 else partial(_launch, case.processes, *how)
        arguments = [*case.flags(corpus), f"--output_dir={folder}", *flags]
        self.forked = Forked(action, arguments, logs, name=str(time.time_ns()), file_size_limit=file_size_limit)

    def signal(self, number: int) -> None:
        """Send a signal to the script, or to torchrun."""
        if self.forked.returncode is None:
            os.kill(self.forked.process.pid, number)

    def kill(self, chance: Random) -> bool:
        """Kill it as the machine's end would, or only one of several processes; return whether it was still running."""
        workers: list[psutil.Process] = []
        with suppress(psutil.NoSuchProcess):
            launcher = psutil.Process(self.forked.process.pid)
            launcher.suspend()  # so that it starts no more workers
            workers = launcher.children()
        self.forked.process.join(timeout=0)
        was_running = self.forked.returncode is None
        one_of_several = len(workers) > 1 and chance.random() < 0.5
        if one_of_several:
            launcher.resume()
        else:
            self.forked.process.kill()
        for worker in [chance.choice(workers)] if one_of_several else workers:
            with suppress(psutil.NoSuchProcess):
                worker.kill()
        self.forked.wait()
        psutil.wait_procs(workers, timeout=60)
        return was_running and self.forked.returncode != 0

    def fail_with_one_line(self) -> str:
        """Wait for its end, which must be that of a mistake or of a machine at its limits; return its last line."""
        self.forked.wait()
        lines = self.forked.stderr.strip().splitlines() or [""]
        assert self.forked.returncode == 2, (self.forked.returncode, self.forked.stderr[-6000:])
        assert "Traceback" not in self.forked.stderr and lines[-1].startswith(self.script), self.forked.stderr[-6000:]
        return lines[-1]

    def succeed(self) -> None:
        """Wait for its end, which must be a good one."""
        self.forked.wait(2000 if LONG else 500)
        assert self.forked.returncode == 0, self.forked.stdout[-2000:] + self.forked.stderr[-6000:]


def resume(case: Case, corpus: Path, folder: Path, **options: Any) -> Disturbed:
    """Start a run as a job of a queue does each time: it continues what is there, or begins."""
    if case.script == "prepare":
        return Disturbed(case, corpus, folder, **options)
    return Disturbed(case, corpus, folder, "--resume_from_checkpoint=latest", **options)


def caches_of(folder: Path) -> Path:
    return folder.parent / f"{folder.name}-caches"


def kill_at(operation: int, folders: Sequence[str]) -> None:
    """Kill this process as soon as it begins its n-th change to a file or folder below `folders`."""
    on_change(folders, _Countdown(operation, lambda: os.kill(os.getpid(), signal.SIGKILL)))


def full_disk_from(operation: int, folders: Sequence[str]) -> None:
    """Let every write below `folders` fail from the n-th on, as on a full disk, to the end of the process."""

    def refuse() -> None:
        raise OSError(28, "No space left on device")

    on_change(folders, _Countdown(operation, refuse, again=True))


def count_changes(path: str, folders: Sequence[str]) -> None:
    """Append a byte to the file `path` for every change below `folders`."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    on_change(folders, lambda event: os.write(descriptor, b"."))


class _Countdown:
    def __init__(self, operation: int, act: Callable[[], None], again: bool = False) -> None:
        self.left, self.act, self.again = operation, act, again

    def __call__(self, event: str) -> None:
        self.left -= 1
        deletes = event in ("os.remove", "os.rmdir", "shutil.rmtree")
        if self.left == 0 or (self.again and self.left < 0 and not deletes):
            self.act()


CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}


def on_change(folders: Sequence[str], act: Callable[[str], object]) -> None:
    """Call `act` with the name of every event by which Python changes something below `folders`, just before it.

    What safetensors and torch write by themselves is not seen, only the files and renames around it.
    """

    def see(event: str, arguments: tuple[Any, ...]) -> None:
        if event != "open" and event not in CHANGES:
            return
        if event == "open" and not _writes(arguments):
            return
        if isinstance(arguments[0], (str, os.PathLike)) and os.fspath(arguments[0]).startswith(tuple(folders)):
            act(event)

    sys.addaudithook(see)


def _writes(arguments: tuple[Any, ...]) -> bool:
    _, mode, flags = arguments
    if isinstance(mode, str):
        return any(letter in mode for letter in "wax+")
    return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def _train(script: Script, caches: Path, fault: Callable[[], None] | None, arguments: Sequence[str]) -> None:
    """Run a script's main function as its file does, with its caches in a folder."""
    import_caches = ("fgpt_hf.data.prepare", "fgpt_hf.data.pretraining", "fgpt_hf.training.finetuning")
    for name in ("huggingface_hub.constants", *import_caches):
        import_module(name).HF_HOME = str(caches)  # type: ignore[attr-defined]
    if script == "prepare":  # small shards, of few documents, so that there are several
        shard_writer.SHARD_TOKENS, stream.BLOCKS_PER_BUFFER, stream.BUFFER_CHARACTERS = 2000, 2, 0
    sys.argv = [script, *arguments]
    if fault:
        fault()
    command_line(import_module(f"fgpt_hf.cli.{script}").main)


def _launch(processes: int, script: Script, caches: Path, *arguments: Any) -> None:
    """Call `_train` in several processes under torchrun."""
    torchrun(processes, caches.parent, _train, script, caches, *arguments)
