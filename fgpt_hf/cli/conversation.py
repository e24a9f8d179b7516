"""The conversation of `fgpt chat` in a terminal: messages that are answered, and commands that begin with a slash."""

import re
import signal
import sys
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fgpt_hf.errors import UserError

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings

    from fgpt_hf.chat import ChatSession

HELP = """/reset         forget all turns
/system TEXT   set the system prompt; without TEXT, remove it
/save FILE     write the conversation as lines of JSON, which training reads
/help          show these lines
/exit, /quit   leave, as exit, quit and Ctrl-D do
Enter sends a message, Alt-Enter begins a new line in it, and a pasted text is one message. Ctrl-C stops a reply. A
message of one line that begins with / needs a space before it."""
WORDS_THAT_LEAVE = ("exit", "quit", "/exit", "/quit")
NOT_TAUGHT = "was not trained to answer: it continues each text on its own."


def converse(session: "ChatSession", name: str) -> None:
    """Answer message after message until the input ends; `name` is the model's."""
    say(f"{name} reads {session.context} tokens. Ctrl-C stops a reply, Ctrl-D leaves, /help says more.")
    if not session.answers:
        say(f"It {NOT_TAUGHT}")
    read = _message_reader()
    while True:
        try:
            message = without_blank_ends(readable(read()))
            if message.strip() in WORDS_THAT_LEAVE:
                return
            if _is_command(message):
                _run_command(session, message)
            elif message:
                _answer(session, message)
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


def _is_command(message: str) -> bool:
    """Return whether a message is a command; of several lines, which may be pasted, only a known one is."""
    return message.startswith("/") and ("\n" not in message or message.split()[0] in COMMANDS)


def _run_command(session: "ChatSession", message: str) -> None:
    name, argument = (*message.split(maxsplit=1), "")[:2]
    if name not in COMMANDS:
        raise UserError(f"unknown command {name}: /help lists all of them")
    COMMANDS[name](session, argument.strip())


def _reset(session: "ChatSession", argument: str) -> None:
    session.reset()
    say("(forgotten)")


def _set_system(session: "ChatSession", argument: str) -> None:
    if not session.answers:
        raise UserError("the model was not trained to answer, so it would continue a system prompt like any other text")
    session.system = argument or None
    say("(from now on)" if argument else "(no system prompt)")


def _save(session: "ChatSession", argument: str) -> None:
    if not session.turns:
        raise UserError("nothing has been said yet")
    if not argument:
        raise UserError("/save FILE needs a name")
    from fgpt_hf.files import json_lines  # with NumPy, which `fgpt --help` does without

    try:
        with Path(argument).expanduser().open("x", encoding="utf-8") as file:
            file.write(json_lines(session.rows))
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


def without_blank_ends(text: str) -> str:
    r"""Remove blank lines around a message, and the space around one of a single line; all other indentation stays.

    Example:
        >>> without_blank_ends(" Hello \n")
        'Hello'
        >>> without_blank_ends("\n    if x:\n        y()\n")
        '    if x:\n        y()'
    """
    text = re.sub(r"\A(\s*\n)+", "", text.rstrip())
    return text if "\n" in text or text.startswith(" /") else text.strip()


def is_terminal(stream: Any) -> bool:
    """Return whether a person reads or writes this stream, which may be None."""
    return stream is not None and bool(stream.isatty())


def _message_reader() -> Callable[[], str]:
    """Return a function that reads a message, with editing and a history where the terminal can show them.

    A pasted text of several lines is one message, because the terminal marks where it ends (bracketed paste).
    """
    from prompt_toolkit import PromptSession
    from prompt_toolkit.output import create_output
    from prompt_toolkit.utils import is_dumb_terminal

    if is_dumb_terminal() or not (is_terminal(sys.stdout) or is_terminal(sys.stderr)):
        return _read_line
    output = create_output(always_prefer_tty=True)  # a redirected stdout gets replies alone
    session: PromptSession[str] = PromptSession(
        multiline=True, prompt_continuation="  ", key_bindings=_keys(), output=output, enable_suspend=True
    )
    return lambda: _read_message(session)


def _read_message(session: "PromptSession[str]") -> str:
    """Read a message. SIGTERM is handled after it: prompt_toolkit would log what a handler raises in its tasks."""
    import asyncio  # which `fgpt --help` does without

    handler, received = signal.getsignal(signal.SIGTERM), False

    def end_prompt() -> None:
        nonlocal received
        received = True
        if session.app.future and not session.app.future.done():
            session.app.exit(result="")

    def watch_for_sigterm() -> None:
        if sys.platform != "win32":
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, end_prompt)

    try:
        return session.prompt("> ", pre_run=watch_for_sigterm)
    finally:
        signal.signal(signal.SIGTERM, handler)
        if received:
            signal.raise_signal(signal.SIGTERM)


def _keys() -> "KeyBindings":
    """Return the keys that differ from an editor's: Enter sends, Alt-Enter begins a new line."""
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()
    keys.add("enter")(lambda event: event.current_buffer.validate_and_handle())
    for enter in ("enter", "c-j"):  # the latter when it was typed while a reply was written
        keys.add("escape", enter)(lambda event: event.current_buffer.insert_text("\n"))
    return keys


def _read_line() -> str:
    print("> ", end="", file=sys.stderr, flush=True)
    return input()


def _is_control(character: str) -> bool:
    return unicodedata.category(character) == "Cc" and character not in "\n\t"
