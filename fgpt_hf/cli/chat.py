"""`fgpt chat`: the options, one reply, or a conversation in a terminal."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Argument, Option

from fgpt_hf.cli.conversation import (
    NOT_TAUGHT,
    converse,
    is_terminal,
    readable,
    say,
    visible,
    without_blank_ends,
    write,
)
from fgpt_hf.cli.options import SEEDS, ModelName, TrustRemoteCode
from fgpt_hf.config.options import Limits
from fgpt_hf.errors import UserError
from fgpt_hf.workers import exit_code_of

if TYPE_CHECKING:
    from fgpt_hf.chat import ChatSession

TERMINATED = exit_code_of(signal.SIGTERM)
MIN_TEMPERATURE = 1e-6  # logits divided by less overflow

Message = Annotated[
    str | None,
    Argument(
        metavar="MESSAGE",
        help="Answer this message and exit. Without it, answer the text from a pipe, or start a conversation.",
    ),
]
System = Annotated[str | None, Option("--system", metavar="TEXT", help="System prompt (default: none).")]
Greedy = Annotated[bool, Option("--greedy", help="Always take the likeliest token instead of sampling.")]
Temperature = Annotated[
    float | None, Option("--temperature", help="Sampling temperature; above 1 is more varied (default: the model's).")
]
TopK = Annotated[
    int | None, Option("--top_k", help="Sample only from this many of the likeliest tokens (default: the model's).")
]
TopP = Annotated[
    float | None,
    Option(
        "--top_p",
        help="Sample only from the likeliest tokens whose probabilities add up to this (default: the model's).",
    ),
]
RepetitionPenalty = Annotated[
    float | None,
    Option(
        "--repetition_penalty",
        help="Make tokens that were used before less likely; 1 turns it off (default: the model's).",
    ),
]
MaxNewTokens = Annotated[
    int | None,
    Option("--max_new_tokens", help="Longest reply in tokens (default: 512, or half the context if that is less)."),
]
Seed = Annotated[int | None, Option("--seed", help="Random seed, for the same replies again (default: a new one).")]


NumberFormat = Annotated[
    Literal["auto", "float32", "bfloat16", "int8"],
    Option(
        "--number_format",
        help="Number format of the weights on a CPU; auto takes the fastest one that keeps the quality.",
    ),
]


def chat(
    model: ModelName,
    message: Message = None,
    system: System = None,
    greedy: Greedy = False,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    repetition_penalty: RepetitionPenalty = None,
    max_new_tokens: MaxNewTokens = None,
    seed: Seed = None,
    number_format: NumberFormat = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Chat with a model, or print its reply to one message.

    Example: fgpt chat runs/quickstart/preference

    Example: fgpt chat runs/quickstart/preference "What does sorted do?"
    """
    sampling = Sampling(greedy, temperature, top_k, top_p, repetition_penalty)
    options = ChatOptions(
        model, system and readable(system), sampling, max_new_tokens, seed, number_format, trust_remote_code
    )
    with _quiet_ends():
        if message is None and is_terminal(sys.stdin):
            converse(_start_session(options), model)
        else:
            message = _require_text(_piped_text() if message is None else readable(message))
            session = _start_session(options)
            if not session.answers:
                say(f"({model} {NOT_TAUGHT})")
            answer_once(session, message)


@dataclass(frozen=True)
class Sampling:
    """Options of `generate` as a user gave them; what is None is left to the model's generation config."""

    greedy: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None

    def __post_init__(self) -> None:
        Limits(minimum=MIN_TEMPERATURE).check("temperature", self.temperature)
        Limits(minimum=0).check("top_k", self.top_k)
        Limits(maximum=1).check("top_p", self.top_p)
        Limits().check("repetition_penalty", self.repetition_penalty)
        sampled = [name for name in ("temperature", "top_k", "top_p") if getattr(self, name) is not None]
        if self.greedy and sampled:
            raise UserError(f"greedy excludes {' and '.join(sampled)}, because nothing is sampled")

    @property
    def generate_options(self) -> dict[str, Any]:
        """Return the keyword arguments for `generate`.

        Example:
            >>> Sampling(temperature=0.7).generate_options
            {'do_sample': True, 'temperature': 0.7}
        """
        names = ("temperature", "top_k", "top_p", "repetition_penalty")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return {"do_sample": not self.greedy} | given


@dataclass(frozen=True)
class ChatOptions:
    """Which model answers, and how."""

    model: str
    system: str | None
    sampling: Sampling
    max_new_tokens: int | None
    seed: int | None
    number_format: str
    trust_remote_code: bool

    def __post_init__(self) -> None:
        Limits().check("max_new_tokens", self.max_new_tokens)
        SEEDS.check("seed", self.seed)


def answer_once(session: "ChatSession", message: str) -> None:
    """Print the reply to one message; in a terminal without the control characters that could steer it."""
    shown = visible if is_terminal(sys.stdout) else str
    reply = session.answer(message, lambda text: write(shown(text)))
    write("\n")
    if reply.stopped:
        raise KeyboardInterrupt


def _start_session(options: ChatOptions) -> "ChatSession":
    import torch  # takes seconds, which a mistake in the options need not wait for
    from transformers.utils import logging

    from fgpt_hf.chat import ChatSession, load_for_chat
    from fgpt_hf.model.io import model_source

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model, tokenizer = load_for_chat(model_source(options.model), options.number_format, options.trust_remote_code)
    if options.seed is not None:
        torch.manual_seed(options.seed)
    return ChatSession(model, tokenizer, options.sampling.generate_options, options.max_new_tokens, options.system)


def _piped_text() -> str:
    return sys.stdin.buffer.read().decode("utf-8", "replace") if sys.stdin else ""


def _require_text(message: str) -> str:
    if not message.strip():
        raise UserError('nothing to answer: give a message, fgpt chat MODEL "What is …?", or pipe one in')
    return without_blank_ends(message)


@contextmanager
def _quiet_ends() -> Iterator[None]:
    """End without a traceback on Ctrl-C, on SIGTERM, and when the reader of the reply has left.

    After SIGTERM the terminal is left as it was, and no thread of a library is waited for.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(TERMINATED))
    try:
        yield
    except SystemExit as leaving:
        if leaving.code != TERMINATED:
            raise
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(TERMINATED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(exit_code_of(signal.SIGINT))
