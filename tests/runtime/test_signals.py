"""SIGTERM and SIGINT end a process through its cleanup, or wait for a step; a second one ends it at once."""

import os
import signal
import time
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest

from fgpt_hf.cli.entry_point import command_line
from fgpt_hf.files import atomic_directory
from fgpt_hf.runtime import signals
from fgpt_hf.runtime.signals import exit_on_signals, stop_signals
from fgpt_hf.workers import STOP_SIGNALS
from tests.support.forked import Forked

SIGNALS = pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])


def prepare(arguments: Sequence[str]) -> None:
    """Write data as long as it is not told to stop."""

    def main(flags: Sequence[str]) -> None:
        with exit_on_signals(), atomic_directory(Path(arguments[0], "data")) as partial:
            (partial / "rows").touch()
            time.sleep(100)

    command_line(main)


def train(arguments: Sequence[str]) -> None:
    """Take a step that never ends, by a clock that the test sets."""
    folder = Path(arguments[0])
    asked = count(1)

    def clock() -> float:
        now = signals.SAME_REQUEST_SECONDS + 1 if (folder / "later").exists() else 0
        (folder / f"signal {next(asked)}").touch()
        return now

    def main(flags: Sequence[str]) -> None:
        with stop_signals() as received_signal:
            (folder / "started").touch()
            while True:
                time.sleep(0.01)
                if received_signal():
                    (folder / f"received {received_signal()}").touch()

    signals.time = SimpleNamespace(monotonic=clock)  # type: ignore[attr-defined, assignment]
    command_line(main)


def started(action: Callable[[Sequence[str]], None], folder: Path, file: str) -> Forked:
    forked = Forked(action, [str(folder)], folder)
    wait_for(folder / file)
    return forked


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.01)


@SIGNALS
def test_a_signal_before_the_first_step_cleans_up_and_says_so(tmp_path: Path, number: int, code: int) -> None:
    forked = started(prepare, tmp_path, "data.partial/rows")
    os.kill(forked.process.pid, number)
    assert forked.wait(60).returncode == code
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.err", "0.out"]
    assert forked.stderr == "" and f"stopped by {signal.Signals(number).name}" in forked.stdout


@SIGNALS
def test_a_second_signal_ends_at_once_and_without_a_traceback(tmp_path: Path, number: int, code: int) -> None:
    """One that comes soon after the first is what a launcher passes on, and not a second request."""
    forked = started(train, tmp_path, "started")
    os.kill(forked.process.pid, number)
    wait_for(tmp_path / f"received {int(number)}")
    os.kill(forked.process.pid, number)
    wait_for(tmp_path / "signal 2")
    assert forked.returncode is None
    (tmp_path / "later").touch()
    os.kill(forked.process.pid, number)
    assert forked.wait(60).returncode == code and forked.stderr == ""


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with pytest.raises(SystemExit) as exit_, exit_on_signals():
        with stop_signals() as received_signal:
            assert received_signal() == 0
            os.kill(os.getpid(), signal.SIGTERM)
            assert received_signal() == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGTERM)
    assert exit_.value.code == 143
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
