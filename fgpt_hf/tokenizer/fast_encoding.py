"""Encode many conversations at once, with the ids that the tokenizer itself gives, several times faster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fgpt_hf.tokenizer.byte_bpe import Ids
from fgpt_hf.tokenizer.chat_encoding import UNMARKED, EncodedConversation, encode_by_template
from fgpt_hf.tokenizer.chat_template import rendering
from fgpt_hf.tokenizer.document_encoder import PROJECT_ENCODER, DocumentEncoder
from fgpt_hf.tokenizer.surrogates import repair_surrogates
from fgpt_hf.tokenizer.tokenizer import CONTROL_TOKENS, has_role_tokens, project_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["UNMARKED", "EncodedConversation", "encode_conversation", "encode_conversations"]


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
        >>> from fgpt_hf.tokenizer.tokenizer import build_tokenizer
        >>> encode_conversation(build_tokenizer(), messages)
        ([50257, 198, 17250, 50260, 198, 50258, 198, 15496, 50260, 198], [0, 0, 0, 0, 0, 0, 0, 1, 1, 0])
    """
    with rendering("not a conversation"):
        encoded: Any = tokenizer.apply_chat_template(
            repair_surrogates(messages), return_assistant_tokens_mask=True, tokenizer_kwargs={"verbose": False}
        )
    return encoded["input_ids"], encoded["assistant_masks"]


def encode_conversations(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Mapping[str, Any]]],
    needs_mask: bool = True,
) -> list[EncodedConversation | ValueError]:
    """Encode conversations by the tokenizer's template, or return the error that tells why one cannot be.

    Nothing merges across control tokens. So with the project's own template, and a tokenizer with a fast encoding, the
    texts between them are encoded as documents, those of all conversations at once, with the same ids.

    Args:
        needs_mask: whether a conversation whose replies cannot be told is an error; else its mask is empty.

    Example:
        >>> messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
        >>> from fgpt_hf.tokenizer.tokenizer import build_tokenizer
        >>> (encoded,) = encode_conversations(build_tokenizer(), [messages])
        >>> encoded.ids[encoded.loss_mask].tolist()
        [15496, 50260]
    """
    encoded: dict[int, EncodedConversation | ValueError] = {}
    if encoder := _turn_encoder(tokenizer):
        fast = [index for index, messages in enumerate(conversations) if _has_plain_turns(messages)]
        texts = iter(encoder.encode(_turn_text(message) for index in fast for message in conversations[index]))
        ids = _TurnIds.of(tokenizer)
        for index in fast:
            encoded[index] = _join_turns(conversations[index], list(islice(texts, len(conversations[index]))), ids)
    others = [index for index in range(len(conversations)) if index not in encoded]
    if encoder == PROJECT_ENCODER:
        encoded |= {index: _encode_alone(tokenizer, conversations[index]) for index in others}
    else:
        found = encode_by_template(tokenizer, [conversations[index] for index in others], needs_mask)
        encoded |= dict(zip(others, found, strict=True))
    return [encoded[index] for index in range(len(conversations))]


def _turn_encoder(tokenizer: PreTrainedTokenizerBase) -> DocumentEncoder | None:
    """Return what encodes the texts between the project's control tokens; None for other templates and slow ones."""
    if tokenizer.chat_template != project_template() or not has_role_tokens(tokenizer):
        return None
    encoder = replace(DocumentEncoder.of(tokenizer), end=None)
    return encoder if encoder.is_fast else None


class _TurnIds(NamedTuple):
    """The ids around the text of a turn."""

    roles: Mapping[str, int]
    end: int
    line_end: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> _TurnIds:
        vocabulary = tokenizer.get_vocab()
        roles = {role: vocabulary[f"<|{role}|>"] for role in ("user", "assistant", "system")}
        return cls(roles, vocabulary["<|end|>"], vocabulary["\u010a"])  # byte-level BPE's character for a line end


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


def _join_turns(messages: Sequence[Mapping[str, str]], texts: Sequence[Ids], turn_ids: _TurnIds) -> EncodedConversation:
    """Join the turns of a conversation, each between its role's token and the end of its turn and line."""
    ids: list[Any] = []
    masks: list[npt.NDArray[np.bool_]] = []
    for message, text in zip(messages, texts, strict=True):
        ids += [[turn_ids.roles[message["role"]]], text, [turn_ids.end, turn_ids.line_end]]
        mask = np.full(len(text) + 3, message["role"] == "assistant")
        mask[[0, 1, -1]] = False  # the role, the line end after it, the line end after the turn
        masks.append(mask)
    return EncodedConversation(np.concatenate(ids).astype(texts[0].dtype), np.concatenate(masks))


def _encode_alone(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]]
) -> EncodedConversation | ValueError:
    try:
        ids, mask = encode_conversation(tokenizer, messages)
    except ValueError as error:
        return error
    return EncodedConversation(np.array(ids, dtype=np.uint16), np.array(mask, dtype=np.bool_))
