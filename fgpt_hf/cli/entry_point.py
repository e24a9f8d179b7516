"""Run a command: show the package's messages, answer a user's mistake with one line, say where to report a bug."""

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from io import TextIOWrapper
from pathlib import Path

from tqdm import tqdm

from fgpt_hf.errors import UserError
from fgpt_hf.workers import exit_code_of

USER_ERROR = 2  # exit code
BUG = "FGPT did not expect this error. Please report it, with the lines above, to the project that you got FGPT from."


def command_line(main: Callable[[Sequence[str]], None]) -> None:
    """Call `main` with the process's arguments; a mistake that a user can mend is one line on stderr and exit code 2.

    Such a mistake is a UserError, or an OSError that carries the operating system's number: `FGPT_TRACEBACK=1` shows
    where it came from. Any other exception is a bug, and keeps its traceback, followed by where to report it.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # which None, without a console, is not
            stream.reconfigure(errors="replace")  # a question mark for what the locale's encoding has no character for
    try:
        with messages_on_stdout():
            main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(exit_code_of(signal.SIGINT))
    except Exception as error:
        message = explanation(error)
        if message is None:
            error.add_note(BUG)
            raise
        if os.environ.get("FGPT_TRACEBACK"):
            raise
        print(f"{_program()}: {message}", file=sys.stderr)
        sys.exit(USER_ERROR)


def script(module: str) -> None:
    """Import a module and call its `main` as `command_line` does; Ctrl-C during the import leaves no traceback."""
    command_line(lambda arguments: import_module(module).main(arguments))


def explanation(error: Exception) -> str | None:
    """Return one line for a mistake that a user can mend, or None for a bug.

    Example:
        >>> explanation(UserError("max_steps=0 must be above zero"))
        'max_steps=0 must be above zero'
        >>> explanation(FileNotFoundError(2, "No such file or directory", "data.jsonl"))
        'data.jsonl: No such file or directory'
        >>> explanation(KeyError("loss")) is None
        True
    """
    if isinstance(error, UserError):
        text = str(error)
    elif isinstance(error, OSError) and error.errno is not None:
        text = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    else:
        return None
    return " ".join(text.split())


@contextmanager
def program_name(name: str) -> Iterator[None]:
    """Let parsers call the program by this name in their help, such as `fgpt train-base`."""
    before = sys.argv[0]
    sys.argv[0] = name
    try:
        yield
    finally:
        sys.argv[0] = before


@contextmanager
def messages_on_stdout() -> Iterator[None]:
    """Write what the package logs, from INFO upwards, to stdout; only the main process of several writes."""
    logger = logging.getLogger("fgpt_hf")
    before = logger.handlers, logger.level, logger.propagate
    is_main_process = os.environ.get("RANK", "0") == "0"
    logger.handlers = [_LinesAboveProgressBars() if is_main_process else logging.NullHandler()]
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.handlers, logger.level, logger.propagate = before


class _LinesAboveProgressBars(logging.Handler):
    """Writes each message as a line of its own, without breaking a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


def _program() -> str:
    """Return the name of the running script; `python -m fgpt_hf` is `fgpt`."""
    path = Path(sys.argv[0])
    return "fgpt" if path.name == "__main__.py" else path.name
