"""A command ends with one line for a user's mistake, and with a traceback and an address for a bug."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from fgpt_hf.cli.entry_point import BUG, command_line
from fgpt_hf.errors import UserError


def outcome(main: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[object, str]:
    """Return the exit code and what stands on stderr."""
    monkeypatch.setattr(sys, "argv", ["/usr/bin/fgpt", "chat"])
    with pytest.raises(SystemExit) as ended:
        command_line(main)
    return ended.value.code, capsys.readouterr().err


def raising(error: BaseException) -> object:
    def main(arguments: Sequence[str]) -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("max_steps=0\n  must be above zero"), "fgpt: max_steps=0 must be above zero\n"),
        (FileNotFoundError(2, "No such file or directory", "a.txt"), "fgpt: a.txt: No such file or directory\n"),
        (OSError(28, "No space left on device"), "fgpt: [Errno 28] No space left on device\n"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(
    error: Exception, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert outcome(raising(error), monkeypatch, capsys) == (2, line)


def test_the_traceback_of_a_mistake_is_shown_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FGPT_TRACEBACK", "1")
    with pytest.raises(UserError):
        command_line(raising(UserError("no")))


@pytest.mark.parametrize("error", [ValueError("shapes differ"), OSError("the connection broke"), KeyError("loss")])
def test_a_bug_keeps_its_traceback_and_asks_for_a_report(error: Exception) -> None:
    with pytest.raises(type(error)) as raised:
        command_line(raising(error))
    assert raised.value.__notes__ == [BUG]


def test_what_the_encoding_of_the_terminal_lacks_is_a_question_mark() -> None:
    program = "from fgpt_hf.cli.entry_point import command_line; command_line(lambda _: print('1 … 2 日'))"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=True)
    assert done.stdout.split() == [b"1", b"?", b"2", b"?"]


def test_an_interrupted_command_ends_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert outcome(raising(KeyboardInterrupt()), monkeypatch, capsys) == (130, "")


PROGRAM = """
import logging
from fgpt_hf.cli.entry_point import command_line

def main(arguments):
    logging.getLogger("fgpt_hf.data").info("reading %s", *arguments)
    logging.getLogger("fgpt_hf.data").debug("not for users")
    raise ValueError("a bug")

command_line(main)
"""


@pytest.mark.parametrize(("rank", "written"), [(None, "reading x\n"), ("0", "reading x\n"), ("1", "")])
def test_messages_are_plain_lines_of_the_main_process(rank: str | None, written: str) -> None:
    environment = {**os.environ, "RANK": rank} if rank else os.environ
    command = [sys.executable, "-c", PROGRAM, "x"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.stdout, done.returncode) == (written, 1)
    lines = done.stderr.splitlines()
    assert lines[0].startswith("Traceback") and lines[-2] == "ValueError: a bug" and lines[-1] == BUG


def test_the_logger_is_left_as_it_was() -> None:
    logger = logging.getLogger("fgpt_hf")
    before = logger.handlers, logger.level, logger.propagate
    command_line(lambda arguments: None)
    assert (logger.handlers, logger.level, logger.propagate) == before


@pytest.mark.slow
@pytest.mark.parametrize("program", ["train_base.py", "train_instruct.py", "train_preference.py"])
def test_a_signal_while_a_script_imports_leaves_no_traceback(program: str) -> None:
    script = Path(__file__).parents[2] / program
    process = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.PIPE, text=True)
    while not any("torch" in mapped.path for mapped in psutil.Process(process.pid).memory_maps()):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=120)[1] == "" and process.returncode == 130
