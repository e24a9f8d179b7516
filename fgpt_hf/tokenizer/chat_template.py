"""Chat templates come with a model, so they are programs that others wrote: bound and explain what they do.

transformers runs them in jinja's sandbox, which keeps them from files and code, but not from running forever.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fgpt_hf.errors import UserError
from fgpt_hf.tokenizer.template_probe import TOO_LARGE
from fgpt_hf.tokenizer.tokenizer import CHAT_TEMPLATE, ORIGINAL_CHAT_TEMPLATE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS = 10  # of computing: a usual template takes milliseconds, and the process around it a fifth of a second
SLOWDOWN = 10  # at most, of a machine that is busy with other work
OUT_OF_TIME = -getattr(signal, "SIGXCPU", 24)  # the exit code of a process that has used up its time


def require_bounded_template(name: str, tokenizer: PreTrainedTokenizerBase, seconds: int = SECONDS) -> None:
    """Refuse a tokenizer whose chat template does not end, or writes without limit; the project's own are not tried.

    Args:
        name: the model's, for the message.
        seconds: limit on the computing time for rendering short conversations.

    Raises:
        UserError: the template takes too long or too much memory, or it is not text.

    Example:
        >>> from fgpt_hf.tokenizer.tokenizer import build_tokenizer
        >>> tokenizer = build_tokenizer()
        >>> tokenizer.chat_template = "{{ 'a' * 10**9 }}"
        >>> require_bounded_template("somebody/model", tokenizer)
        Traceback (most recent call last):
            ...
        fgpt_hf.errors.UserError: the chat template of somebody/model writes without limit: replace it, or delete it
    """
    found = tokenizer.chat_template
    templates = list(found.values()) if isinstance(found, dict) else [] if found is None else [found]
    if not all(isinstance(template, str) for template in templates):
        raise UserError(f"the chat template of {name} is not text: replace it, or delete it")
    foreign = [template for template in templates if template not in _own_templates()]
    if not foreign:
        return
    probe = [sys.executable, "-P", str(Path(__file__).with_name("template_probe.py")), str(seconds)]
    try:
        texts, wall_seconds = json.dumps(foreign), SLOWDOWN * seconds
        code = subprocess.run(probe, input=texts, text=True, capture_output=True, timeout=wall_seconds).returncode
    except subprocess.TimeoutExpired:
        code = OUT_OF_TIME
    if code == TOO_LARGE:
        raise UserError(f"the chat template of {name} writes without limit: replace it, or delete it")
    if code == OUT_OF_TIME:
        raise UserError(f"the chat template of {name} does not end within {seconds} seconds: replace it, or delete it")


@contextmanager
def rendering(problem: str) -> Iterator[None]:
    """Turn what a chat template raises, which can be anything, into a UserError that begins with `problem`.

    Example:
        >>> with rendering("not a conversation"):
        ...     raise ZeroDivisionError("division by zero")
        Traceback (most recent call last):
            ...
        fgpt_hf.errors.UserError: not a conversation: division by zero
    """
    try:
        yield
    except Exception as error:
        raise UserError(f"{problem}: {str(error) or type(error).__name__}") from error


def _own_templates() -> list[str]:
    names = (CHAT_TEMPLATE, ORIGINAL_CHAT_TEMPLATE)
    return [Path(__file__).with_name(name).read_text(encoding="utf-8") for name in names]
