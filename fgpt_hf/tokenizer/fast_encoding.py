"""Text to ids: GPT-2's byte-level BPE, the control tokens of a conversation, and the chat template.

`build_tokenizer` gives the tokenizer that a model publishes. `encode_documents` gives the same ids for plain text,
several times faster. `encode_conversation` gives a conversation's ids and the mask of what the assistant says in it;
`encode_conversations` gives those of thousands.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import tiktoken
from jinja2 import TemplateError

from fgpt_hf.errors import UserError
from fgpt_hf.tokenizer.tokenizer import (
    CHAT_TEMPLATE,
    CONTROL_TOKENS,
    END_OF_TURN_ID,
    _read_vocabulary,
    build_tokenizer,
    has_control_tokens,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
# GPT-2's pattern ends in `\s+(?!\S)|\s+`: white space before a word leaves its last character to the word. A pattern
# without that look-ahead is matched twice as fast, and gives the same pieces where the text is cut there before.
_PIECES = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+"
_SPACES = [*range(9, 14), 0x20, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000]
_IS_SPACE = np.isin(np.arange(_SPACES[-1] + 2), _SPACES)  # by code point, the last one for all greater ones
_MARKS = _CUT, _END = (
    "\U000ffffe",
    "\U000fffff",
)  # where to cut and where a document ends: Unicode has no such characters
_MARK_IDS = _CUT_ID, _END_ID = 65534, 65535
_NEWLINE_ID = 198
_DOCUMENTS_PER_TASK = 128  # fewer cost more in handing over than they gain in sharing out


def encode_documents(texts: Iterable[str], threads: int | None = None) -> list[npt.NDArray[np.uint16]]:
    """Return one array of ids per text, equal to the tokenizer's own; no special token is added. All cores by default.

    Text that spells a control token stays text. A lone surrogate, which UTF-8 cannot hold, becomes U+FFFD.
    """
    texts = list(texts)
    tasks = [texts[start : start + _DOCUMENTS_PER_TASK] for start in range(0, len(texts), _DOCUMENTS_PER_TASK)]
    encoding = _plain_encoding()
    with ThreadPoolExecutor(threads) as pool:  # tiktoken works outside Python's lock, so threads are enough
        encoded = pool.map(lambda task: _encode_together(encoding, task), tasks)
        return [ids for task in encoded for ids in task]


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]]
) -> tuple[list[int], list[int]]:
    """Return the ids of a conversation and its mask, equally long: 1 on each reply and the <|end|> after it, else 0.

    A message is {"role": …, "content": …}. Raises UserError if the chat template refuses the messages.
    """
    try:
        encoded: Any = tokenizer.apply_chat_template(
            repair_surrogates(messages), return_assistant_tokens_mask=True, tokenizer_kwargs={"verbose": False}
        )
    except TemplateError as error:
        raise UserError(f"not a conversation: {error}") from error
    return encoded["input_ids"], encoded["assistant_masks"]


class Encoded(NamedTuple):
    """A conversation's ids, and where they are the assistant's: on each reply and the <|end|> after it."""

    ids: npt.NDArray[np.uint16]
    replies: npt.NDArray[np.bool_]


def encode_conversations(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Sequence[Mapping[str, Any]]]
) -> list[Encoded | ValueError]:
    """Return what `encode_conversation` gives for each, or the error that it raises, many times faster.

    Between control tokens nothing merges, so with the project's own template the texts between them are encoded as
    documents, all of them together.
    """
    is_fast = _is_ours(tokenizer)
    plain = [number for number, messages in enumerate(conversations) if is_fast and _is_plain(messages)]
    texts = encode_documents(_turn_text(message) for number in plain for message in conversations[number])
    encoded: dict[int, Encoded | ValueError] = {}
    start = 0
    for number in plain:
        stop = start + len(conversations[number])
        encoded[number] = _joined(conversations[number], texts[start:stop])
        start = stop
    for number, messages in enumerate(conversations):
        if number not in encoded:
            encoded[number] = _encoded_by_template(tokenizer, messages)
    return [encoded[number] for number in range(len(conversations))]


def _is_ours(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether this is the project's tokenizer with the project's template."""
    template = Path(__file__).with_name(CHAT_TEMPLATE).read_text(encoding="utf-8")
    return tokenizer.chat_template == template and has_control_tokens(tokenizer)


def _is_plain(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the template takes the messages, and each is a string: all that the fast way knows of the template."""
    turns = messages[1:] if messages and messages[0].get("role") == "system" else messages
    return all(isinstance(message.get("content"), str) for message in messages) and all(
        message.get("role") == ("assistant" if number % 2 else "user") for number, message in enumerate(turns)
    )


def _turn_text(message: Mapping[str, str]) -> str:
    """What the template writes between a role's token and the end of its turn."""
    text = message["content"]
    for token in CONTROL_TOKENS:
        text = text.replace(token, token.replace("<", "< "))
    return "\n" + (text.lstrip() if message["role"] == "assistant" else text)


def _joined(messages: Sequence[Mapping[str, str]], texts: Sequence[npt.NDArray[np.uint16]]) -> Encoded:
    """The turns of a conversation, each with its role in front and the end of the turn and of the line behind."""
    ids: list[Any] = []
    replies: list[npt.NDArray[np.bool_]] = []
    for message, text in zip(messages, texts, strict=True):
        ids += [[CONTROL_TOKENS[f"<|{message['role']}|>"]], text, [END_OF_TURN_ID, _NEWLINE_ID]]
        is_reply = np.full(len(text) + 3, message["role"] == "assistant")
        is_reply[[0, 1, -1]] = False
        replies.append(is_reply)
    return Encoded(np.concatenate(ids).astype(np.uint16), np.concatenate(replies))


def _encoded_by_template(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]]
) -> Encoded | ValueError:
    try:
        ids, mask = encode_conversation(tokenizer, messages)
    except ValueError as error:
        return error
    return Encoded(np.array(ids, dtype=np.uint16), np.array(mask, dtype=np.bool_))


def _encode_together(encoding: tiktoken.Encoding, texts: Sequence[str]) -> list[npt.NDArray[np.uint16]]:
    """The ids of each text, from one call for all of them."""
    if any(mark in text for text in texts for mark in (_CUT, _END)):
        encode = build_tokenizer().encode
        return [
            np.array(encode(repair_surrogates(t), split_special_tokens=True, verbose=False), np.uint16) for t in texts
        ]
    text = _with_cuts(repair_surrogates("".join(text + _END for text in texts)))
    ids = encoding.encode_to_numpy(text, allowed_special={_CUT, _END}, disallowed_special=()).astype(np.uint16)
    ids = ids[ids != _CUT_ID]
    ends = np.flatnonzero(ids == _END_ID)
    return [part[:-1] for part in np.split(ids, ends + 1)[:-1]]


def _with_cuts(text: str) -> str:
    """The text with a mark before the last white space of each run that a word follows."""
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    space = _IS_SPACE[np.minimum(codes, len(_IS_SPACE) - 1)]
    before_word = space[1:-1] & ~space[2:] & (codes[2:] != ord(_END))
    cuts = np.flatnonzero(space[:-2] & before_word) + 1
    return _CUT.join(text[start:stop] for start, stop in pairwise([0, *cuts.tolist(), len(text)]))


@lru_cache(maxsize=1)
def _plain_encoding() -> tiktoken.Encoding:
    """Return the same BPE in tiktoken, which needs the bytes of each token instead of their printable stand-ins."""
    vocabulary, _ = _read_vocabulary()
    del vocabulary["<|endoftext|>"]
    printable = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}
    ranks = {bytes(byte_of[character] for character in token): rank for token, rank in vocabulary.items()}
    return tiktoken.Encoding(
        "gpt2", pat_str=_PIECES, mergeable_ranks=ranks, special_tokens=dict(zip(_MARKS, _MARK_IDS, strict=True))
    )


def repair_surrogates(value: Any) -> Any:
    """Return text, or messages full of it, with surrogate pairs joined and lone surrogates as U+FFFD."""
    if isinstance(value, str):
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, Mapping):
        return {key: repair_surrogates(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [repair_surrogates(item) for item in value]
    return value
