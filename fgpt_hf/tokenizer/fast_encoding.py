"""Encode many texts or conversations at once, with the ids that the tokenizer itself gives, several times faster.

tiktoken computes the same byte-pair merges outside Python's lock, so threads share the work. transformers is not needed
to encode documents; processes that only do that start quickly.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import tiktoken

from fgpt_hf.tokenizer.chat_template import rendering
from fgpt_hf.tokenizer.tokenizer import (
    CONTROL_TOKENS,
    END_OF_TURN_ID,
    build_tokenizer,
    read_vocabulary,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# GPT-2's pattern ends in `\s+(?!\S)|\s+`: of the white space before a word, the last character goes to the word. This
# pattern has no such look-ahead and matches twice as fast. It gives the same pieces if the text is cut there before.
_PIECES = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+"
_SPACES = [*range(9, 14), 0x20, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000]
_IS_SPACE = np.isin(np.arange(_SPACES[-1] + 2), _SPACES)  # by code point; the last entry stands for all greater ones
# Where to cut, and where a document ends: code points that Unicode never assigns, with ids that no token has.
_CUT, _END = "\U000ffffe", "\U000fffff"
_CUT_ID, _END_ID = 65534, 65535
_NEWLINE_ID = 198
UNMARKED = "the chat template does not mark what the assistant says: it needs {% generation %} around the replies"
_DOCUMENTS_PER_TASK = 128  # with fewer, handing tasks over costs more than sharing them gains


def encode_documents(texts: Iterable[str], threads: int | None = None) -> list[npt.NDArray[np.uint16]]:
    """Return the ids of each text, equal to the tokenizer's own, without special tokens.

    Text that spells a control token stays text. A lone surrogate, which UTF-8 cannot encode, becomes U+FFFD.

    Args:
        threads: number of threads; by default one for each core.

    Example:
        >>> [ids.tolist() for ids in encode_documents(["Hello, world", "<|end|>"])]
        [[15496, 11, 995], [27, 91, 437, 91, 29]]
    """
    texts = list(texts)
    tasks = [texts[start : start + _DOCUMENTS_PER_TASK] for start in range(0, len(texts), _DOCUMENTS_PER_TASK)]
    encoding = _plain_encoding()
    with ThreadPoolExecutor(threads) as pool:  # tiktoken releases Python's lock
        encoded = pool.map(lambda task: _encode_batch(encoding, task), tasks)
        return [ids for task in encoded for ids in task]


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

    ids: npt.NDArray[np.uint16]
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
    project = build_tokenizer()
    return (
        type(tokenizer) is type(project)
        and tokenizer.chat_template == project.chat_template
        and not tokenizer.split_special_tokens
        and _rules(tokenizer) == _rules(project)
    )


def _rules(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return all that decides the ids of a text: vocabulary, merges, added tokens and every step around them."""
    rules: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return {name: value for name, value in rules.items() if name not in ("padding", "truncation")}


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


def _join_turns(messages: Sequence[Mapping[str, str]], texts: Sequence[npt.NDArray[np.uint16]]) -> EncodedConversation:
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


def _encode_batch(encoding: tiktoken.Encoding, texts: Sequence[str]) -> list[npt.NDArray[np.uint16]]:
    """Return the ids of each text, from one call for all of them."""
    if any(mark in text for text in texts for mark in (_CUT, _END)):
        encode = build_tokenizer().encode
        lists = [encode(repair_surrogates(text), split_special_tokens=True, verbose=False) for text in texts]
        return [np.array(ids, np.uint16) for ids in lists]
    text = _insert_cuts(repair_surrogates("".join(text + _END for text in texts)))
    ids = encoding.encode_to_numpy(text, allowed_special={_CUT, _END}, disallowed_special=()).astype(np.uint16)
    ids = ids[ids != _CUT_ID]
    ends = np.flatnonzero(ids == _END_ID)
    return [part[:-1] for part in np.split(ids, ends + 1)[:-1]]


def _insert_cuts(text: str) -> str:
    """Put a mark before the last white-space character of each run that a word follows."""
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    space = _IS_SPACE[np.minimum(codes, len(_IS_SPACE) - 1)]
    before_word = space[1:-1] & ~space[2:] & (codes[2:] != ord(_END))
    cuts = np.flatnonzero(space[:-2] & before_word) + 1
    return _CUT.join(text[start:stop] for start, stop in pairwise([0, *cuts.tolist(), len(text)]))


@lru_cache(maxsize=1)
def _plain_encoding() -> tiktoken.Encoding:
    """Return the same BPE in tiktoken, which takes the bytes of each token instead of their printable stand-ins."""
    vocabulary, _ = read_vocabulary()
    del vocabulary["<|endoftext|>"]
    printable = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}
    ranks = {bytes(byte_of[character] for character in token): rank for token, rank in vocabulary.items()}
    return tiktoken.Encoding(
        "gpt2", pat_str=_PIECES, mergeable_ranks=ranks, special_tokens={_CUT: _CUT_ID, _END: _END_ID}
    )


def repair_surrogates(value: Any) -> Any:
    """Return text, or containers of text, with surrogate pairs joined and lone surrogates replaced by U+FFFD.

    Example:
        >>> repair_surrogates({"content": "a\\ud800b"})
        {'content': 'a\ufffdb'}
    """
    if isinstance(value, str):
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, Mapping):
        return {repair_surrogates(key): repair_surrogates(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [repair_surrogates(item) for item in value]
    return value
