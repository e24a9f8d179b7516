"""Encode many conversations at once, with the ids that the tokenizer itself gives, several times faster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fgpt_hf.tokenizer.byte_bpe import Ids
from fgpt_hf.tokenizer.chat_template import rendering
from fgpt_hf.tokenizer.document_encoder import encode_documents, is_project_vocabulary
from fgpt_hf.tokenizer.surrogates import repair_surrogates
from fgpt_hf.tokenizer.tokenizer import CONTROL_TOKENS, END_OF_TURN_ID, build_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NEWLINE_ID = 198
UNMARKED = "the chat template does not mark what the assistant says: it needs {% generation %} around the replies"


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]]
) -> tuple[list[int], list[int]]:
    """Return the ids of a conversation and a mask of equal length: 1 on each reply and the `<|end|>` after it, else 0.

    Args:
        messages: each `{"role": …, "content": …}`.

    Raises:
        UserError: the chat template refuses the messages.

    Example:
        >>> messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
        >>> encode_conversation(build_tokenizer(), messages)
        ([50257, 198, 17250, 50260, 198, 50258, 198, 15496, 50260, 198], [0, 0, 0, 0, 0, 0, 0, 1, 1, 0])
    """
    with rendering("not a conversation"):
        encoded: Any = tokenizer.apply_chat_template(
            repair_surrogates(messages), return_assistant_tokens_mask=True, tokenizer_kwargs={"verbose": False}
        )
    return encoded["input_ids"], encoded["assistant_masks"]


class EncodedConversation(NamedTuple):
    """The ids of a conversation, and a mask of those to learn: each reply and the `<|end|>` after it."""

    ids: Ids
    loss_mask: npt.NDArray[np.bool_]


def encode_conversations(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Sequence[Mapping[str, Any]]]
) -> list[EncodedConversation | ValueError]:
    """Encode each conversation as `encode_conversation` does, or return the error that it raises, many times faster.

    Nothing merges across control tokens. So with the project's own template the texts between them are encoded as
    documents, those of all conversations at once.

    Example:
        >>> messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
        >>> (encoded,) = encode_conversations(build_tokenizer(), [messages])
        >>> encoded.ids[encoded.loss_mask].tolist()
        [15496, 50260]
    """
    is_fast = _is_project_tokenizer(tokenizer)
    fast = [index for index, messages in enumerate(conversations) if is_fast and _has_plain_turns(messages)]
    texts = iter(encode_documents(_turn_text(message) for index in fast for message in conversations[index]))
    encoded: dict[int, EncodedConversation | ValueError] = {
        index: _join_turns(conversations[index], list(islice(texts, len(conversations[index])))) for index in fast
    }
    for index, messages in enumerate(conversations):
        if index not in encoded:
            encoded[index] = _encode_by_template(tokenizer, messages)
    return [encoded[index] for index in range(len(conversations))]


def _is_project_tokenizer(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether this is the project's tokenizer with the project's template, and no token or rule besides."""
    return tokenizer.chat_template == build_tokenizer().chat_template and is_project_vocabulary(tokenizer)


def _has_plain_turns(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether there are messages, each content is a string, and the template accepts the roles."""
    if not messages:
        return False
    turns = messages[1:] if messages[0].get("role") == "system" else messages
    return all(isinstance(message.get("content"), str) for message in messages) and all(
        message.get("role") == ("assistant" if index % 2 else "user") for index, message in enumerate(turns)
    )


def _turn_text(message: Mapping[str, str]) -> str:
    """Return what the template writes between a role's token and the end of its turn."""
    text = message["content"]
    for token in CONTROL_TOKENS:
        text = text.replace(token, token.replace("<", "< "))
    return "\n" + (text.lstrip() if message["role"] == "assistant" else text)


def _join_turns(messages: Sequence[Mapping[str, str]], texts: Sequence[Ids]) -> EncodedConversation:
    """Join the turns of a conversation, each between its role's token and the end of its turn and line."""
    ids: list[Any] = []
    masks: list[npt.NDArray[np.bool_]] = []
    for message, text in zip(messages, texts, strict=True):
        ids += [[CONTROL_TOKENS[f"<|{message['role']}|>"]], text, [END_OF_TURN_ID, _NEWLINE_ID]]
        mask = np.full(len(text) + 3, message["role"] == "assistant")
        mask[[0, 1, -1]] = False  # the role, the line end after it, the line end after the turn
        masks.append(mask)
    return EncodedConversation(np.concatenate(ids).astype(np.uint16), np.concatenate(masks))


def _encode_by_template(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]]
) -> EncodedConversation | ValueError:
    try:
        ids, mask = encode_conversation(tokenizer, messages)
    except ValueError as error:
        return error
    return EncodedConversation(np.array(ids, dtype=np.uint16), np.array(mask, dtype=np.bool_))
