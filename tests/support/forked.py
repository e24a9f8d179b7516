"""Command lines in processes that are forked from one that has imported torch and transformers: each starts at once.

    done = run_command("train_base.py", "--preset", "quickstart", cwd=folder)
    assert done.returncode == 0, done.stderr

A real `python train_base.py` spends four to eight seconds of a core on imports. A package that reads the environment at
its import, as `huggingface_hub` reads `HF_ENDPOINT`, saw that of this process: other values need a real process.
"""

import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
import tomllib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures.process import _python_exit as end_executors
from importlib import import_module
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

ROOT = Path(__file__).parents[2]
METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"  # Windows cannot fork
SERVER: Any = multiprocessing.get_context(METHOD)
SERVER.set_forkserver_preload(
    [
        "tests.support.loop_run",
        "peft",
        *(f"fgpt_hf.cli.{name}" for name in ("train_base", "train_instruct", "train_preference")),
        *(
            f"fgpt_hf.{name}"
            for name in ("evaluation.benchmark", "hub.publish", "convert.export", "chat", "report.summary")
        ),
    ]
)


class Forked:
    """A process that calls `action(arguments)`; its output is in two files of `logs`."""

    def __init__(
        self,
        action: Callable[[Sequence[str]], object],
        arguments: Sequence[str],
        logs: Path,
        *,
        name: str = "0",
        environment: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        file_size_limit: int | None = None,
    ) -> None:
        self._output, self._errors = logs / f"{name}.out", logs / f"{name}.err"
        for log in (self._output, self._errors):
            log.touch()  # here, since a process that is killed at once has not opened them
        values = {**os.environ, **(environment or {})}
        call = (action, arguments, values, self._output, self._errors, cwd or Path.cwd(), file_size_limit)
        self.process = SERVER.Process(target=_call, args=call)
        self.process.start()

    @property
    def returncode(self) -> int | None:
        """The exit code, negative for a signal; None while the process runs."""
        code: int | None = self.process.exitcode
        return code

    @property
    def stdout(self) -> str:
        return self._output.read_text("utf-8")

    @property
    def stderr(self) -> str:
        return self._errors.read_text("utf-8")

    def wait(self, timeout: float = 500) -> "Forked":
        """Wait for its end, and kill it after `timeout` seconds."""
        self.process.join(timeout=timeout)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        return self


def run_command(
    program: str | Path, *arguments: object, cwd: Path | None = None, processes: int = 1
) -> CompletedProcess[str]:
    """Run a script, or a command that the package installs, to its end, and return what the main process printed.

    Args:
        program: a script's path, by itself or from the repository's root, or a name of `[project.scripts]`.
        cwd: the working directory of the processes; by default that of this one.
        processes: how many processes run it together, as under `torchrun`.
    """
    command = [str(program), *map(str, arguments)]
    with tempfile.TemporaryDirectory() as logs, held_port() as holder:
        group = [
            Forked(_run, command, Path(logs), name=str(rank), environment=environment, cwd=cwd)
            for rank, environment in enumerate(process_group(processes, port_of(holder)))
        ]
        done = [forked.wait() for forked in group]
        code = next((forked.returncode for forked in done if forked.returncode), 0)
        return CompletedProcess(command, code, done[0].stdout, done[0].stderr)


def process_group(processes: int, port: int) -> list[dict[str, str]]:
    """Return the environment by which each of several processes finds the others; nothing for a single one."""
    if processes == 1:
        return [{}]
    shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), **shared} for rank in range(processes)]


def held_port() -> socket.socket:
    """Return a socket that holds a port: a process may listen there, but nobody who asks for any free port gets it."""
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as that process does
    holder.bind(("127.0.0.1", 0))
    return holder


def port_of(holder: socket.socket) -> int:
    return int(holder.getsockname()[1])


def _run(command: Sequence[str]) -> None:
    program, *arguments = command
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["scripts"]
    if program in scripts:
        module, _, function = scripts[program].partition(":")
        sys.argv = [program, *arguments]
        sys.exit(getattr(import_module(module), function)())
    script = ROOT / program  # an absolute path stays what it is
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")


def _call(
    action: Callable[[Sequence[str]], object],
    arguments: Sequence[str],
    environment: Mapping[str, str],
    output: Path,
    errors: Path,
    cwd: Path,
    file_size_limit: int | None,
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for descriptor, path in ((1, output), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY), descriptor)
    if file_size_limit:
        _limit_file_size(file_size_limit)
    try:
        action(arguments)
    finally:
        end_executors()  # as at the end of any program, but multiprocessing would first wait for their processes


def _limit_file_size(limit: int) -> None:
    """Let a write past this many bytes fail, as on a full disk."""
    import resource  # not on Windows

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
