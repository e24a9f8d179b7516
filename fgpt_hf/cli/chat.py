"""`fgpt chat`: a conversation with a model in a terminal; one question from the command line or from a pipe."""

import json
import os
import signal
import sys
import unicodedata
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fgpt_hf.config.runs import require_amounts
from fgpt_hf.errors import UserError
from fgpt_hf.model.io import model_folder

if TYPE_CHECKING:
    from fgpt_hf.chat import ChatSession

HELP = 'a conversation in the terminal: fgpt chat runs/quickstart/preference, with a "question" at the end one reply'
COMMANDS = """/reset         forget what was said
/system TEXT   give the system prompt, without TEXT take it away
/save FILE     write the conversation as a line of JSON, which training reads
/help          these lines
Ctrl-C stops a reply, Ctrl-D leaves; a message that begins with / needs a space before it."""
SAMPLING = ("temperature", "top_k", "top_p")


def add_chat(commands: Any) -> None:
    """Add `chat`, with its arguments, to the subparsers of `fgpt`."""
    parser: ArgumentParser = commands.add_parser("chat", help=HELP, description=__doc__)
    parser.set_defaults(function=chat)
    add = parser.add_argument
    add("model", help="a model's or a run's folder, or the id of a model on the Hub")
    add("message", nargs="?", help="answer this and leave; without it, what a pipe brings, or a conversation")
    add("--system", metavar="TEXT", help="system prompt")
    add("--greedy", action="store_true", help="always the likeliest token, instead of drawing one")
    add("--temperature", type=float, help="over 1 more daring, under 1 less (this and the next: as the model says)")
    add("--top_k", type=int, metavar="N", help="draw from the N likeliest tokens")
    add("--top_p", type=float, metavar="SHARE", help="draw from the likeliest tokens that have this share together")
    add("--repetition_penalty", type=float, metavar="FACTOR", help="over 1: tokens that were used are less likely")
    add("--max_new_tokens", type=int, metavar="N", help="of a reply (default: 512, or half the context if less)")
    add("--seed", type=int, help="for the same replies again")
    add("--trust_remote_code", action="store_true", help="run the code that comes with a model of the Hub")


def chat(options: Namespace) -> None:
    """Talk in a terminal, or answer one message on stdout.

    Raises:
        UserError: no such model, one without a chat template, an option that cannot be, or nothing to answer.
    """
    decoding = _decoding(options)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # the terminal is left as it was
    try:
        if options.message is None and _is_terminal(sys.stdin):
            _talk(_dialogue(options, decoding), options.model)
        else:
            message = _clean(_piped() if options.message is None else options.message)
            _answer_once(_dialogue(options, decoding), message)
    except BrokenPipeError:  # who read the reply has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def _decoding(options: Namespace) -> dict[str, Any]:
    """The options of `generate`; what is not given is as the model's generation config has it."""
    require_amounts(
        {name: getattr(options, name) for name in (*SAMPLING, "repetition_penalty", "max_new_tokens", "seed")},
        may_be_zero=("top_k", "seed"),
    )
    if options.top_p is not None and options.top_p > 1:
        raise UserError(f"top_p={options.top_p} must be a share, such as 0.9")
    given = {name: getattr(options, name) for name in SAMPLING if getattr(options, name) is not None}
    if options.greedy and given:
        raise UserError(f"greedy excludes {' and '.join(given)}, since nothing is drawn")
    if options.repetition_penalty is not None:
        given["repetition_penalty"] = options.repetition_penalty
    return {"do_sample": not options.greedy} | given


def _dialogue(options: Namespace, decoding: Mapping[str, Any]) -> "ChatSession":
    import torch  # seconds that a mistake in the options need not wait
    from transformers.utils import logging

    from fgpt_hf.chat import ChatSession
    from fgpt_hf.model.io import load_model

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    name = str(model_folder(Path(options.model))) if Path(options.model).is_dir() else options.model
    model, tokenizer = load_model(name, "auto", options.trust_remote_code)
    model.to(torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu"))  # type: ignore[arg-type]
    if options.seed is not None:
        torch.manual_seed(options.seed)
    return ChatSession(model, tokenizer, decoding, options.max_new_tokens, options.system and _clean(options.system))


def _answer_once(dialogue: "ChatSession", message: str) -> None:
    shown = _visible if sys.stdout.isatty() else str  # what a pipe gets is the reply as it is
    reply = dialogue.answer(message, lambda text: _write(shown(text)))
    _write("\n")
    if reply.stopped:
        raise KeyboardInterrupt


def _talk(dialogue: "ChatSession", name: str) -> None:
    """Answer line after line until the input ends."""
    with suppress(ImportError):  # Windows has none
        import readline  # noqa: F401  gives `input` editing and a history
    _say(f"{name} reads {dialogue.context} tokens. Ctrl-C stops a reply, Ctrl-D leaves, /help says more.")
    while True:
        try:
            line = _clean(_read_line())
            if line.startswith("/"):
                _command(dialogue, line)
            elif line.strip():
                _answer(dialogue, line.strip())
        except EOFError:
            return _say("")
        except KeyboardInterrupt:
            _say("")
        except ValueError as error:
            _say(f"({error})")


def _answer(dialogue: "ChatSession", message: str) -> None:
    """Write the reply, and say what could not be seen from it."""
    reply = dialogue.answer(message, lambda text: _write(_visible(text)))
    _write("\n")
    if reply.stopped:
        _say("(stopped)")
    elif not reply.text:
        _say("(no words: the model ended its reply at once)")
    if reply.turns_dropped:
        _say(f"(no longer in the context of {dialogue.context} tokens: the {_oldest(reply.turns_dropped)})")


def _oldest(turns: int) -> str:
    return "oldest turn" if turns == 1 else f"{turns} oldest turns"


def _command(dialogue: "ChatSession", line: str) -> None:
    name, _, argument = line.partition(" ")
    if name not in ACTIONS:
        raise UserError(f"there is no {name}: /help lists what there is")
    ACTIONS[name](dialogue, argument.strip())


def _reset(dialogue: "ChatSession", argument: str) -> None:
    dialogue.reset()
    _say("(forgotten)")


def _system(dialogue: "ChatSession", argument: str) -> None:
    dialogue.system = argument or None
    _say("(from now on)" if argument else "(no system prompt)")


def _save(dialogue: "ChatSession", argument: str) -> None:
    if not argument or not dialogue.turns:
        raise UserError("/save FILE needs a name" if dialogue.turns else "nothing has been said yet")
    try:
        with Path(argument).expanduser().open("x", encoding="utf-8") as file:
            file.write(json.dumps({"messages": dialogue.messages}, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"not saved: {error}") from error
    _say(f"(saved: {argument})")


ACTIONS: Mapping[str, Callable[["ChatSession", str], None]] = {
    "/reset": _reset,
    "/system": _system,
    "/save": _save,
    "/help": lambda dialogue, argument: _say(COMMANDS),
}


def _piped() -> str:
    message = sys.stdin.buffer.read().decode("utf-8", "replace") if sys.stdin else ""
    if not message.strip():
        raise UserError('nothing to answer: give a message, fgpt chat MODEL "What is …?", or pipe one in')
    return message.strip()


def _read_line() -> str:
    if _is_terminal(sys.stdout):
        return input("> ")
    print("> ", end="", file=sys.stderr, flush=True)  # what goes into a file is replies alone
    return input()


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _say(text: str) -> None:
    """Tell the user something that is no reply."""
    print(text, file=sys.stderr, flush=True)


def _visible(text: str) -> str:
    """The text with marks for control characters, with which a model could otherwise steer the terminal."""
    return "".join("\N{REPLACEMENT CHARACTER}" if _controls(letter) else letter for letter in text)


def _controls(letter: str) -> bool:
    return unicodedata.category(letter) == "Cc" and letter not in "\n\t"


def _clean(text: str) -> str:
    """The text with marks for bytes that are no UTF-8, which arrive as lone surrogates."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _is_terminal(stream: Any) -> bool:
    return stream is not None and stream.isatty()
