"""A chat with a language model: its turns, those of them that fit in the context, and its streamed replies.

A model that was not trained to answer continues texts instead, each by itself.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from fgpt_hf.config.runs import TuningRun, kind_of_run
from fgpt_hf.errors import UserError, one_line
from fgpt_hf.model.cpu_generation import (
    TEXT,
    TIMED_PARAMETERS,
    available_formats,
    cache_options,
    formats_by_speed,
    loaded_dtype,
    prepare,
    time_formats,
)
from fgpt_hf.model.io import context_length, load_model
from fgpt_hf.model.lora import has_adapter
from fgpt_hf.tokenizer.chat_template import rendering
from fgpt_hf.tokenizer.tokenizer import has_role_tokens
from fgpt_hf.training.records import RECORD, find_run, read_record
from fgpt_hf.training.start_model import unseen_role_tokens

MAX_REPLY_TOKENS = 512  # or half the context where that is less
Message = dict[str, str]


@dataclass(frozen=True)
class Turn:
    """A message of the user and the model's reply to it."""

    user: str
    assistant: str


@dataclass(frozen=True)
class ChatReply:
    """The outcome of a message.

    Attributes:
        text: the reply, without control tokens.
        stopped: whether a KeyboardInterrupt ended it.
        turns_dropped: number of turns that no longer fit in the context since the reply before.
    """

    text: str
    stopped: bool
    turns_dropped: int


def as_messages(system: str | None, turns: Sequence[Turn]) -> list[Message]:
    """Return a chat as the list of messages that chat templates and datasets use.

    Example:
        >>> as_messages("Be brief.", [Turn("2 + 2?", "4.")])[1:]
        [{'role': 'user', 'content': '2 + 2?'}, {'role': 'assistant', 'content': '4.'}]
    """
    messages = [{"role": "system", "content": system}] if system else []
    for turn in turns:
        messages += [{"role": "user", "content": turn.user}, {"role": "assistant", "content": turn.assistant}]
    return messages


def turns_to_drop(turns: int, length_without: Callable[[int], int], max_length: int) -> int:
    """Return how many of the oldest turns must go for the prompt to fit; all of them if it never does.

    Args:
        turns: number of turns before the message that the prompt ends with, which always stays.
        length_without: tokens of the prompt without this many of the oldest turns.
        max_length: tokens that the prompt may have.

    Example:
        >>> turns_to_drop(2, [30, 20, 10].__getitem__, max_length=25)
        1
    """
    return next((dropped for dropped in range(turns) if length_without(dropped) <= max_length), turns)


def is_trained_to_answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a model was trained on conversations, as far as its folder and its weights show.

    Every FGPT model has a chat template. The run's record says what a model was trained on; without one, a model whose
    embeddings of the users' and the assistant's tokens lie among those of unused tokens has never seen a conversation.
    """
    if tokenizer.chat_template is None:
        return False
    name = model.name_or_path  # nothing for a model that was not loaded
    if name and Path(name).is_dir() and (run := find_run(Path(name))):
        return issubclass(kind_of_run(read_record(run / RECORD)), TuningRun)
    if has_adapter(model) or not has_role_tokens(tokenizer):
        return True
    return not {"<|user|>", "<|assistant|>"} <= set(unseen_role_tokens(model, tokenizer))


def load_for_chat(
    name: str, number_format: str = "auto", trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model to write as fast as this machine allows; it can be neither trained nor saved.

    On a GPU its weights stay as they are stored.

    Args:
        name: a model's folder, or its id on the Hub.
        number_format: format of the weights on a CPU: float32, bfloat16 or int8, or `auto` for the fastest here that
            keeps the loss of a fixed text.
        trust_remote_code: run the code that comes with a model on the Hub.

    Raises:
        UserError: there is no such model, it cannot be loaded, or this machine has no such format.
    """
    if number_format not in ("auto", *available_formats()):
        raise UserError(
            f"number_format={number_format} is not available here: choose from auto, {', '.join(available_formats())}"
        )
    tokenizer: PreTrainedTokenizerBase
    model: Any
    model, tokenizer = load_model(name, "auto", trust_remote_code)
    device: Any = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if device.type != "cpu":
        return model.to(device), tokenizer
    parameters = model.num_parameters()
    timed = time_formats() if number_format == "auto" and parameters >= TIMED_PARAMETERS else {}
    formats = formats_by_speed(parameters, timed) if number_format == "auto" else [number_format]
    text: list[int] = tokenizer(TEXT)["input_ids"][: context_length(model, tokenizer)] if len(formats) > 1 else []
    model.to(loaded_dtype(formats[0]))
    if not prepare(model, formats[0], text):
        if len(formats) == 1:
            raise UserError(f"number_format={number_format} is not available for a {type(model).__name__}: choose auto")
        model = load_model(name, loaded_dtype(formats[1]), trust_remote_code)[0]
        prepare(model, formats[1])
    return model, tokenizer


class ChatSession:
    """A chat of one user with one model.

    Args:
        model: any causal language model, on its device.
        tokenizer: its tokenizer.
        decoding: options of `generate`, such as `{"do_sample": True, "temperature": 0.7}`.
        max_new_tokens: longest reply, for which room is kept in the context (default: 512, or half the context).
        system: system prompt.

    Attributes:
        answers: whether the model was trained to answer; one that was not continues texts, and remembers none of them.
        system: system prompt, which may be changed at any time.
        turns: all turns, including those that no longer fit in the context.

    Raises:
        UserError: a model that was not trained to answer is given a system prompt, or the longest reply fills the whole
            context.

    Example:
        >>> from fgpt_hf import FGPTConfig, FGPTForCausalLM
        >>> from fgpt_hf.tokenizer.tokenizer import build_tokenizer
        >>> model = FGPTForCausalLM(FGPTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
        >>> session = ChatSession(model, build_tokenizer(), {"do_sample": False}, max_new_tokens=4)
        >>> reply = session.answer("Hello", write=lambda words: None)
        >>> [message["role"] for message in session.messages]
        ['user', 'assistant']
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        decoding: Mapping[str, Any],
        max_new_tokens: int | None = None,
        system: str | None = None,
    ) -> None:
        self.answers = is_trained_to_answer(model, tokenizer)
        if system and not self.answers:
            raise UserError(
                f"{model.name_or_path} was not trained to answer, so it would continue a system prompt like any other "
                "text: leave system out, or choose a model that was tuned on conversations"
            )
        self.model, self.tokenizer, self.decoding, self.system = model, tokenizer, decoding, system
        self.context = context_length(model, tokenizer)
        self.max_new_tokens = max_new_tokens or min(MAX_REPLY_TOKENS, self.context // 2)
        if self.max_new_tokens >= self.context:
            raise UserError(
                f"max_new_tokens={max_new_tokens} leaves no room for a message: the model reads {self.context} tokens"
            )
        self.turns: list[Turn] = []
        self._dropped = 0

    @property
    def messages(self) -> list[Message]:
        """Return the whole chat as chat templates and datasets have it."""
        return as_messages(self.system, self.turns)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Return what was said as rows that training reads: one conversation, or texts."""
        return (
            [{"messages": self.messages}]
            if self.answers
            else [{"text": turn.user + turn.assistant} for turn in self.turns]
        )

    def reset(self) -> None:
        """Forget all turns."""
        self.turns, self._dropped = [], 0

    def answer(self, message: str, write: Callable[[str], None]) -> ChatReply:
        """Reply to a message, and remember both; a KeyboardInterrupt stops the reply and keeps what was written.

        Args:
            message: the user's message.
            write: called with each piece of the reply, of whole words, as soon as it is there.

        Raises:
            UserError: the message alone fills the context, the chat template refuses it, or the model cannot write,
                for example because its weights are not finite. The message is not remembered.
        """
        dropped_before = self._dropped
        prompt = self._prompt(message)
        streamer = _WordStreamer(self.tokenizer, write)
        stopped = False
        try:
            self._generate(prompt, streamer)
        except KeyboardInterrupt:
            stopped = True
            streamer.end()
        self.turns.append(Turn(message, streamer.text))
        return ChatReply(streamer.text, stopped, self._dropped - dropped_before)

    def _generate(self, prompt: torch.Tensor, streamer: TextStreamer) -> None:
        generate: Any = self.model.generate
        try:
            generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                streamer=streamer,
                max_new_tokens=min(self.max_new_tokens, self.context - prompt.shape[1]),
                pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
                **cache_options(self.model),
                **self.decoding,
            )
        except OSError:  # the reader of the reply has left
            raise
        except Exception as error:  # weights and the generation config come with the model, and can hold anything
            raise UserError(f"{self.model.name_or_path} cannot write a reply: {one_line(error)}") from error

    def _prompt(self, message: str) -> torch.Tensor:
        """Return the ids `(1, tokens)` of the system prompt, the latest turns that fit, and the message.

        A turn that has been dropped once stays out. A model that was not trained to answer reads the message alone.
        """

        def ids_without(dropped: int) -> list[int]:
            if not self.answers:
                return self._begin_document(message)
            messages = as_messages(self.system, self.turns[self._dropped + dropped :])
            return self._encode([*messages, {"role": "user", "content": message}])

        max_length = self.context - self.max_new_tokens
        turns = len(self.turns) - self._dropped if self.answers else 0
        dropped = turns_to_drop(turns, lambda count: len(ids_without(count)), max_length)
        ids = ids_without(dropped)
        if len(ids) >= self.context:
            subject = "the message with the system prompt" if self.system else "the message"
            raise UserError(f"{subject} has {len(ids)} tokens, and the model reads {self.context}: make it shorter")
        self._dropped += dropped
        return torch.tensor([ids], device=self.model.device)

    def _begin_document(self, text: str) -> list[int]:
        """Return the ids of a text after the token that begins or ends a document, as in base training."""
        ids: list[int] = self.tokenizer(text, split_special_tokens=True)["input_ids"]  # typed control tokens stay text
        starts = [self.tokenizer.bos_token_id, self.tokenizer.eos_token_id]
        start = [token for token in starts if token is not None][:1]
        return ids if ids[:1] == start else [*start, *ids]

    def _encode(self, messages: list[Message]) -> list[int]:
        with rendering("the chat template refuses the messages"):
            encoded: Any = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, sanitize_control_tokens=True
            )
        ids: list[int] = encoded["input_ids"]
        return ids


class _WordStreamer(TextStreamer):
    """Passes the reply on in whole words, and keeps all of it in `text`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write, self.text = write, ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        self.write(text)
