"""From a visitor's message to a reply: its check, its prompt, and the limits, which page and API share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypedDict

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from language_model import LanguageModel, Progress, Settings
from visitors import Visitors

MAX_MESSAGE = 4_000  # characters
MAX_SYSTEM_PROMPT = 1_000
MAX_HISTORY = 100  # messages
MAX_TURN = 4 * MAX_MESSAGE  # characters per message: replies are longer
MIN_ROOM = 8  # minimum number of tokens left for the reply


class Reply(NamedTuple):
    """A reply so far, and a note about it for the visitor."""

    text: str
    note: str


class Chat:
    """One model that writes one reply at a time, each within a number of seconds."""

    def __init__(self, model: LanguageModel, seconds: float) -> None:
        self.model, self.seconds = model, seconds

    def reply(self, message: Any, history: Any, system_prompt: Any, settings: Settings) -> Iterator[Reply]:
        """Check the input, and return an iterator over the reply as it grows.

        Raises:
            ValueError: the input is invalid; the message says why.
        """
        prompt = self._prompt(message, history, system_prompt, settings)
        allowed = replace(settings, max_new_tokens=min(int(settings.max_new_tokens), prompt.room))
        return self._replies(prompt, allowed)

    def _replies(self, prompt: Prompt, allowed: Settings) -> Iterator[Reply]:
        for progress in self.model.write(prompt.ids, allowed, self.seconds):
            yield Reply(progress.text, self._note(prompt, progress, allowed))

    def _prompt(self, message: Any, history: Any, system_prompt: Any, settings: Settings) -> Prompt:
        text, turns = checked_message(message), checked_history(history)
        system = checked_text(system_prompt, "system prompt", MAX_SYSTEM_PROMPT)
        if not self.model.answers:
            return text_prompt(self.model.tokenizer, text, self.model.context)
        asked: Sequence[Message] = [*turns, {"role": "user", "content": text}]
        return chat_prompt(self.model.tokenizer, asked, system, self.model.context, int(settings.max_new_tokens))

    def _note(self, prompt: Prompt, progress: Progress, settings: Settings) -> str:
        speed = f"{progress.tokens / progress.seconds:,.0f} tokens/s" if progress.seconds else ""
        seed = "" if settings.greedy else f"seed {int(settings.seed)}"
        parts = [f"{len(prompt.ids):,} tokens read, {progress.tokens:,} written", speed, seed]
        if prompt.left_out:
            turns = "turn" if prompt.left_out == 1 else f"{prompt.left_out} turns"
            parts.append(f"the first {turns} left out: the model reads {self.model.context:,} tokens")
        if progress.out_of_time:
            parts.append(f"stopped after {self.seconds:.0f} s")
        elif progress.tokens >= prompt.room:
            parts.append("the context is full")
        return " · ".join(filter(None, parts))


@dataclass(frozen=True)
class Demo:
    """What the page and the API share: the model, the base model to compare it with, and the limit of each visitor."""

    chat: Chat
    base: Chat | None
    visitors: Visitors


class Message(TypedDict):
    role: str
    content: str


class Prompt(NamedTuple):
    """Token ids, the number of turns left out at the beginning, and the number of tokens left for the reply."""

    ids: list[int]
    left_out: int
    room: int


def checked_text(text: Any, name: str, longest: int) -> str:
    """Return the text as valid Unicode.

    Raises:
        ValueError: it is not a string, or too long.
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
    """Return a visitor's message; raise ValueError if it is invalid or empty."""
    text = checked_text(message, "message", MAX_MESSAGE)
    if not text.strip():
        raise ValueError("the message is empty: write something")
    return text


def checked_history(history: Any) -> list[Message]:
    """Return complete turns, each a user's message and the assistant's reply.

    Raises:
        ValueError: the history is anything else, for example with a forged role.
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
    """Return the conversation up to the last message, without the oldest turns if the reply needs their room.

    The reply gets room for `wanted` tokens or half the context, whichever is less, or for what the last message leaves.

    Raises:
        ValueError: the last message alone is too long, or the model's template refuses the conversation.
    """
    system: list[Message] = [{"role": "system", "content": system_prompt}] if system_prompt.strip() else []
    first = len(turns) - 1
    ids = _rendered(tokenizer, [*system, *turns[first:]])
    while first:  # from the newest turn: the oldest ones may not be needed
        longer = _rendered(tokenizer, [*system, *turns[first - 2 :]])
        if len(longer) + min(wanted, context // 2) > context:
            break
        ids, first = longer, first - 2
    return Prompt(ids, first // 2, _room(ids, context))


def text_prompt(tokenizer: PreTrainedTokenizerBase, text: str, context: int) -> Prompt:
    """Return the text as the beginning of a document, for a base model to continue.

    Raises:
        ValueError: the text is too long.
    """
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = [*start, *tokenizer.encode(harmless(tokenizer, text), add_special_tokens=False)]
    return Prompt(ids, 0, _room(ids, context))


def harmless(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Return the text with a space inside anything that spells a control token, which makes it ordinary text."""
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
