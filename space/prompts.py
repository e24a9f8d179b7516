"""From what a visitor sent to what the model reads: checked, harmless, and no longer than the model's context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypedDict

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

MAX_MESSAGE = 4_000  # characters
MAX_SYSTEM_PROMPT = 1_000
MAX_HISTORY = 100  # messages
MAX_TURN = 4 * MAX_MESSAGE  # characters of each: replies are longer
MIN_ROOM = 8  # tokens for a reply


class Message(TypedDict):
    role: str
    content: str


class Prompt(NamedTuple):
    """Ids, how many of the first turns they leave out, and how many tokens there is room for behind them."""

    ids: list[int]
    left_out: int
    room: int


def checked_text(text: Any, name: str, longest: int) -> str:
    """The text, as Unicode that can be encoded.

    Raises:
        ValueError: it is no text, or too long.
    """
    if not isinstance(text, str):
        raise ValueError(f"the {name} must be text, not {type(text).__name__}")
    if len(text) > longest:
        raise ValueError(f"the {name} has {len(text):,} characters: {longest:,} at most")
    return (
        text.encode("utf-16-le", "surrogatepass")
        .decode("utf-16-le", "replace")
        .replace("\0", "\N{REPLACEMENT CHARACTER}")
    )


def checked_message(message: Any) -> str:
    """A visitor's message; raises ValueError also for an empty one."""
    text = checked_text(message, "message", MAX_MESSAGE)
    if not text.strip():
        raise ValueError("the message is empty: write something")
    return text


def checked_history(history: Any) -> list[Message]:
    """Whole turns, each of a user's message and the assistant's reply.

    Raises:
        ValueError: they are something else, a forged role for example.
    """
    if not isinstance(history, list) or len(history) > MAX_HISTORY:
        raise ValueError(f"the history must be a list of {MAX_HISTORY} messages at most")
    turns: list[Message] = []
    for number, message in enumerate(history, start=1):
        role = "assistant" if number % 2 == 0 else "user"
        if not isinstance(message, dict) or message.get("role") != role:
            raise ValueError(
                f"message {number} of the history must have the role '{role}': a user's and an assistant's in turn"
            )
        content = checked_text(message.get("content"), f"message {number} of the history", MAX_TURN)
        turns.append({"role": role, "content": content})
    if len(turns) % 2:
        raise ValueError("the history ends with a user's message: it must end with the reply to it")
    return turns


def chat_prompt(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message], system_prompt: str, context: int, wanted: int
) -> Prompt:
    """The conversation up to the last message, without as many first turns as must go to leave room for the reply.

    Room for `wanted` tokens, for half the context if that is less, or for what the last message alone leaves.

    Raises:
        ValueError: the last message alone is too long; the model's template refuses the conversation.
    """
    system: list[Message] = [{"role": "system", "content": system_prompt}] if system_prompt.strip() else []
    first = len(turns) - 1
    ids = _rendered(tokenizer, [*system, *turns[first:]])
    while first:  # backwards, so that what is left out costs no work
        longer = _rendered(tokenizer, [*system, *turns[first - 2 :]])
        if len(longer) + min(wanted, context // 2) > context:
            break
        ids, first = longer, first - 2
    return Prompt(ids, first // 2, _room(ids, context))


def text_prompt(tokenizer: PreTrainedTokenizerBase, text: str, context: int) -> Prompt:
    """The text as the beginning of a document, which a base model continues.

    Raises:
        ValueError: it is too long.
    """
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = [*start, *tokenizer.encode(harmless(tokenizer, text), add_special_tokens=False)]
    return Prompt(ids, 0, _room(ids, context))


def harmless(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The text with a space inside whatever spells a control token, so that it cannot become one."""
    for token in sorted({str(token) for token in tokenizer.added_tokens_decoder.values()}, key=len, reverse=True):
        text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    safe = [{**message, "content": harmless(tokenizer, message["content"])} for message in messages]
    try:
        return list(tokenizer.apply_chat_template(safe, add_generation_prompt=True, return_dict=False))  # type: ignore[arg-type]
    except TemplateError as error:
        raise ValueError(f"this model does not read such a conversation: {error}") from error


def _room(ids: Sequence[int], context: int) -> int:
    room = context - len(ids)
    if room < MIN_ROOM:
        raise ValueError(
            f"the message is {len(ids):,} tokens with its frame, and the model reads {context:,}: shorten it"
        )
    return room
