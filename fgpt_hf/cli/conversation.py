"""The conversation of `fgpt chat` in a terminal: lines that are answered, and commands that begin with a slash."""

import json
import sys
import unicodedata
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fgpt_hf.errors import UserError

if TYPE_CHECKING:
    from fgpt_hf.chat import ChatSession

HELP = """/reset         forget all turns
/system TEXT   set the system prompt; without TEXT, remove it
/save FILE     write the conversation as a line of JSON, which training reads
/help          show these lines
Ctrl-C stops a reply, Ctrl-D leaves; a message that begins with / needs a space before it."""


def converse(session: "ChatSession", name: str) -> None:
    """Answer line after line until the input ends; `name` is the model's."""
    with suppress(ImportError):  # Windows has none
        import readline  # noqa: F401  gives `input` editing and a history
    say(f"{name} reads {session.context} tokens. Ctrl-C stops a reply, Ctrl-D leaves, /help says more.")
    while True:
        try:
            line = readable(_read_line())
            if line.startswith("/"):
                _run_command(session, line)
            elif line.strip():
                _answer(session, line.strip())
        except EOFError:
            return say("")
        except KeyboardInterrupt:
            say("")
        except UserError as error:
            say(f"({error})")


def _answer(session: "ChatSession", message: str) -> None:
    """Write the reply, and add what cannot be seen from it."""
    reply = session.answer(message, lambda text: write(visible(text)))
    write("\n")
    if reply.stopped:
        say("(stopped)")
    elif not reply.text:
        say("(no words: the model ended its reply at once)")
    if reply.turns_dropped:
        turns = "oldest turn" if reply.turns_dropped == 1 else f"{reply.turns_dropped} oldest turns"
        say(f"(no longer in the context of {session.context} tokens: the {turns})")


# Commands


def _run_command(session: "ChatSession", line: str) -> None:
    name, _, argument = line.partition(" ")
    if name not in COMMANDS:
        raise UserError(f"unknown command {name}: /help lists all of them")
    COMMANDS[name](session, argument.strip())


def _reset(session: "ChatSession", argument: str) -> None:
    session.reset()
    say("(forgotten)")


def _set_system(session: "ChatSession", argument: str) -> None:
    session.system = argument or None
    say("(from now on)" if argument else "(no system prompt)")


def _save(session: "ChatSession", argument: str) -> None:
    if not session.turns:
        raise UserError("nothing has been said yet")
    if not argument:
        raise UserError("/save FILE needs a name")
    try:
        with Path(argument).expanduser().open("x", encoding="utf-8") as file:
            file.write(json.dumps({"messages": session.messages}, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"not saved: {error}") from error
    say(f"(saved: {argument})")


def _help(session: "ChatSession", argument: str) -> None:
    say(HELP)


COMMANDS: Mapping[str, Callable[["ChatSession", str], None]] = {
    "/reset": _reset,
    "/system": _set_system,
    "/save": _save,
    "/help": _help,
}


# The terminal


def write(text: str) -> None:
    """Write a piece of a reply to stdout at once."""
    print(text, end="", flush=True)


def say(text: str) -> None:
    """Write a line that is not part of a reply to stderr."""
    print(text, file=sys.stderr, flush=True)


def visible(text: str) -> str:
    r"""Replace control characters, with which a model could steer the terminal.

    Example:
        >>> visible("\x1b[2JHello")
        '\ufffd[2JHello'
    """
    return "".join("\N{REPLACEMENT CHARACTER}" if _is_control(character) else character for character in text)


def readable(text: str) -> str:
    """Replace bytes that are not UTF-8, which arrive as lone surrogates.

    Example:
        >>> readable("caf\\udce9")
        'caf�'
    """
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def is_terminal(stream: Any) -> bool:
    """Return whether a person reads or writes this stream, which may be None."""
    return stream is not None and bool(stream.isatty())


def _read_line() -> str:
    if is_terminal(sys.stdout):
        return input("> ")
    print("> ", end="", file=sys.stderr, flush=True)  # a redirected stdout gets replies alone
    return input()


def _is_control(character: str) -> bool:
    return unicodedata.category(character) == "Cc" and character not in "\n\t"
