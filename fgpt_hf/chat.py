"""A conversation with a model: what has been said, what of it the model still reads, and its reply as it comes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from fgpt_hf.errors import UserError
from fgpt_hf.evaluation.encoding import context_length

LONGEST_REPLY = 512  # tokens, or half the context where that is less


class Turn(NamedTuple):
    """A message of the user and the reply to it."""

    user: str
    assistant: str


class ChatReply(NamedTuple):
    """What came of a message: the text, whether it was stopped, and how many of the oldest turns it cost."""

    text: str
    stopped: bool
    turns_dropped: int


def as_messages(system: str | None, turns: Sequence[Turn]) -> list[dict[str, str]]:
    """The messages of a conversation, as chat templates and data sets have them."""
    first = [{"role": "system", "content": system}] if system else []
    return first + [{"role": role, "content": text} for turn in turns for role, text in turn._asdict().items()]


def turns_to_drop(turns: int, length_without: Callable[[int], int], longest: int) -> int:
    """The least number of oldest turns without which a prompt has at most `longest` tokens, or all of them.

    Args:
        turns: how many came before the message that the prompt ends with, which is never dropped.
        length_without: the tokens of the prompt without so many of the oldest turns.
    """
    return next((dropped for dropped in range(turns) if length_without(dropped) <= longest), turns)


class ChatSession:
    """What a user and a model say to each other.

    Attributes:
        system: what the model is told before the first turn, or None.
        turns: all turns, also those that the model no longer reads.

    Args:
        model: any causal language model, on its device, whose tokenizer has a chat template.
        decoding: options of `generate`.
        max_new_tokens: of a reply; the room that is kept for it. By default `LONGEST_REPLY` or half the context.

    Raises:
        UserError: the tokenizer has no chat template, or a reply could be as long as the context.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        decoding: Mapping[str, Any],
        max_new_tokens: int | None = None,
        system: str | None = None,
    ) -> None:
        if tokenizer.chat_template is None:
            raise UserError(
                f"{model.name_or_path} has no chat template, so nothing tells it who speaks: choose a model that was "
                "trained to answer"
            )
        self.model, self.tokenizer, self.decoding, self.system = model, tokenizer, decoding, system
        self.context = context_length(model, tokenizer)
        self.max_new_tokens = max_new_tokens or min(LONGEST_REPLY, self.context // 2)
        if self.max_new_tokens >= self.context:
            raise UserError(
                f"max_new_tokens={max_new_tokens} leaves no room for a message: the model reads {self.context} tokens"
            )
        self.turns: list[Turn] = []
        self._dropped = 0

    @property
    def messages(self) -> list[dict[str, str]]:
        """All that was said, as chat templates and data sets have it."""
        return as_messages(self.system, self.turns)

    def reset(self) -> None:
        """Forget all turns."""
        self.turns, self._dropped = [], 0

    def answer(self, message: str, write: Callable[[str], None]) -> ChatReply:
        """Reply to a message, word by word as it comes, and remember both. KeyboardInterrupt stops the reply.

        Raises:
            UserError: the message alone fills the context, or the chat template refuses it; it is not remembered.
        """
        dropped_before = self._dropped
        input_ids = self._prompt(message)
        streamer = _Words(self.tokenizer, write)
        stopped = False
        try:
            self.model.generate(  # type: ignore[operator]
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                streamer=streamer,
                max_new_tokens=min(self.max_new_tokens, self.context - input_ids.shape[1]),
                pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
                **self.decoding,
            )
        except KeyboardInterrupt:
            stopped = True
            streamer.end()
        self.turns.append(Turn(message, streamer.text))
        return ChatReply(streamer.text, stopped, self._dropped - dropped_before)

    def _prompt(self, message: str) -> torch.Tensor:
        """The ids of what the model reads, `(1, T)`: the system message, the latest turns that leave room, the message.

        A turn that did not fit once is not read again.
        """

        def ids_without(dropped: int) -> list[int]:
            messages = as_messages(self.system, self.turns[self._dropped + dropped :])
            return self._encode([*messages, {"role": "user", "content": message}])

        longest = self.context - self.max_new_tokens
        turns = len(self.turns) - self._dropped
        dropped = turns_to_drop(turns, lambda count: len(ids_without(count)), longest)
        ids = ids_without(dropped)
        if len(ids) >= self.context:
            whole = "the message with the system prompt" if self.system else "the message"
            raise UserError(f"{whole} has {len(ids)} tokens, and the model reads {self.context}: make it shorter")
        self._dropped += dropped
        return torch.tensor([ids], device=self.model.device)

    def _encode(self, messages: list[dict[str, str]]) -> list[int]:
        try:
            encoded: Any = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, sanitize_control_tokens=True
            )
        except TemplateError as error:
            raise UserError(f"the chat template refuses the messages: {error}") from error
        return encoded["input_ids"]


class _Words(TextStreamer):
    """Hands the reply on in whole words, and keeps it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write, self.text = write, ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        self.write(text)
