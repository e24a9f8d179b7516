"""Encode conversations by any chat template, with a mask of what the assistant says.

The mask comes from the template's own marks, `{% generation %}`, if it has them. Otherwise it is what a reply adds to
the rendering of the messages before it. That works only if the template writes a message in the same way whatever
follows it, which is checked for every reply. Text that spells a control token is encoded as text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding

from fgpt_hf.errors import UserError
from fgpt_hf.tokenizer.byte_bpe import Ids
from fgpt_hf.tokenizer.chat_template import rendering
from fgpt_hf.tokenizer.surrogates import repair_surrogates

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, Any]]

UNMARKED = "the chat template does not mark what the assistant says: it needs {% generation %} around the replies"
# Around text that spells a control token: code points that Unicode never assigns.
_BEGIN, _END = "\U0001fffe", "\U0001ffff"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class RepliesUnknown(UserError):
    """A conversation, rendered as `text`, of which the template does not show what the assistant says."""

    def __init__(self, message: int, text: str) -> None:
        super().__init__(
            f"message {message} shows that the chat template writes a message in another way when others follow, so "
            "what the assistant says cannot be told: put {% generation %} around the replies in the template"
        )
        self.text = text


class RenderedChat(NamedTuple):
    """What a template writes for a conversation, and where in it the assistant's words begin and end."""

    text: str
    replies: Sequence[tuple[int, int]]


class EncodedConversation(NamedTuple):
    """The ids of a conversation, and a mask of those to learn: each reply, and the token that ends it."""

    ids: Ids
    loss_mask: npt.NDArray[np.bool_]


def encode_by_template(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Messages], needs_mask: bool = True
) -> list[EncodedConversation | ValueError]:
    """Return the ids and the mask of each conversation, or the error that tells why it has none.

    Args:
        needs_mask: whether a conversation whose replies cannot be told is an error; else its mask is empty.

    Example:
        >>> from fgpt_hf.tokenizer.tokenizer import build_tokenizer
        >>> tokenizer = build_tokenizer()
        >>> tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>{% endfor %}"
        >>> messages = [{"role": "user", "content": "<|end|>?"}, {"role": "assistant", "content": "Text"}]
        >>> (encoded,) = encode_by_template(tokenizer, [messages])
        >>> tokenizer.decode(encoded.ids), tokenizer.decode(encoded.ids[encoded.loss_mask])
        ('user: <|end|>?<|end|>assistant: Text<|end|>', 'assistant: Text<|end|>')
        >>> int((encoded.ids == 50260).sum())
        2
    """
    rendered = [_render_or_error(tokenizer, messages, needs_mask) for messages in conversations]
    plain = [index for index, chat in enumerate(rendered) if isinstance(chat, RenderedChat) and _BEGIN not in chat.text]
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = False  # the template writes control tokens
    backend.no_truncation()
    backend.no_padding()
    chats = [chat for chat in (rendered[index] for index in plain) if isinstance(chat, RenderedChat)]
    encodings = backend.encode_batch([chat.text for chat in chats], add_special_tokens=False)
    encoded: dict[int, EncodedConversation | ValueError] = {
        index: _with_mask(encoding, chat) for index, encoding, chat in zip(plain, encodings, chats, strict=True)
    }
    for index, chat in enumerate(rendered):
        if index not in encoded:
            encoded[index] = chat if isinstance(chat, ValueError) else _encode_in_parts(tokenizer, chat)
    return [encoded[index] for index in range(len(rendered))]


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> RenderedChat:
    """Return what the template writes, and where in it the replies are; text that spells control tokens is marked.

    Raises:
        UserError: the template refuses the messages, or it writes a message in another way when others follow.
    """
    control_tokens = _control_tokens(tokenizer)
    marked = _mark(repair_surrogates(messages), control_tokens)
    if _GENERATION.search(str(tokenizer.get_chat_template())):
        return _render_with_marks(tokenizer, marked)
    text, replies = _render(tokenizer, marked), []
    for index, message in enumerate(marked):
        if message.get("role") != "assistant":
            continue
        before = _render(tokenizer, marked[:index], add_generation_prompt=True)
        after = _render(tokenizer, marked[: index + 1])
        if not (text.startswith(after) and after.startswith(before)):
            raise RepliesUnknown(index + 1, text)
        replies.append((len(before), _end_of_reply(control_tokens, text, len(before), len(after))))
    return RenderedChat(text, replies)


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the control token that ends a reply by the chat template, or None if there is none."""
    if not tokenizer.chat_template:
        return None
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    (encoded,) = encode_by_template(tokenizer, [messages])
    if isinstance(encoded, ValueError) or not encoded.loss_mask.any():
        return None
    last = int(encoded.ids[encoded.loss_mask][-1])
    return last if last in tokenizer.added_tokens_decoder else None


def _render_or_error(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, needs_mask: bool
) -> RenderedChat | ValueError:
    try:
        return render_chat(tokenizer, messages)
    except RepliesUnknown as error:
        return error if needs_mask else RenderedChat(error.text, ())
    except UserError as error:
        return error


def _render(tokenizer: PreTrainedTokenizerBase, messages: Messages, **options: Any) -> str:
    chat: Any = list(messages)
    with rendering("not a conversation"):
        return str(tokenizer.apply_chat_template(chat, tokenize=False, **options))


def _render_with_marks(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> RenderedChat:
    from transformers.utils.chat_template_utils import render_jinja_template

    options: dict[str, Any] = {**tokenizer.special_tokens_map, "return_assistant_tokens_mask": True}
    conversations: Any = [list(messages)]
    with rendering("not a conversation"):
        rendered: Any = render_jinja_template(conversations, chat_template=tokenizer.get_chat_template(), **options)
    (text,), (replies,) = rendered
    return RenderedChat(text, replies)


def _end_of_reply(control_tokens: tuple[str, ...], text: str, start: int, stop: int) -> int:
    """Return where a reply ends: after the control token at its end, without the white space after that."""
    reply = text[start:stop].rstrip()
    return start + len(reply) if reply.endswith(control_tokens) else stop


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Return the special tokens, and the added tokens that the template writes, the longest first."""
    template = str(tokenizer.get_chat_template())
    added = tokenizer.added_tokens_decoder.values()
    found = {token.content for token in added if token.special or token.content in template}
    return tuple(sorted((token for token in found if token.strip()), key=lambda token: (-len(token), token)))


@lru_cache(maxsize=8)
def _pattern(tokens: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, tokens)) or "(?!)")


def _mark(value: Any, tokens: tuple[str, ...]) -> Any:
    """Return messages with marks around text that spells a control token, in all that they say."""
    if isinstance(value, str):
        return _pattern(tokens).sub(f"{_BEGIN}\\g<0>{_END}", value.replace(_BEGIN, "").replace(_END, ""))
    if isinstance(value, Mapping):
        return {key: item if key in ("role", "type") else _mark(item, tokens) for key, item in value.items()}
    return [_mark(item, tokens) for item in value] if isinstance(value, (list, tuple)) else value


def _encode_in_parts(tokenizer: PreTrainedTokenizerBase, chat: RenderedChat) -> EncodedConversation | ValueError:
    """Encode marked text as text, and all between as the template wrote it."""
    ids: list[int] = []
    starts: list[int] = []
    position = 0
    for part in re.split(f"({_BEGIN}[^{_END}]*{_END})", chat.text):
        is_marked = part.startswith(_BEGIN)
        text, first = (part[1:-1], position + 1) if is_marked else (part, position)
        found = _encode_part(tokenizer, text, is_marked, is_first=position == 0)
        if is_marked and tokenizer.convert_tokens_to_ids(text) in [token for token, _ in found]:
            return UserError(f"it spells {text}, which the tokenizer reads as that control token, even as text")
        ids += [token for token, _ in found]
        starts += [first + offset for _, offset in found]
        position += len(part)
    mask, at = np.zeros(len(ids), dtype=np.bool_), np.array(starts, dtype=np.int64)
    for begin, stop in chat.replies:
        mask |= (at >= begin) & (at < stop)
    return EncodedConversation(np.array(ids, dtype=np.uint32), mask)


def _encode_part(tokenizer: PreTrainedTokenizerBase, text: str, as_text: bool, is_first: bool) -> list[tuple[int, int]]:
    """Return the ids of a part of a text, each with where it begins.

    A part in the middle is encoded after a line end, so that SentencePiece puts no space before it.
    """
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = as_text
    try:
        line = [] if is_first else backend.encode("\n", add_special_tokens=False).ids
        joined = backend.encode("" if is_first else "\n" + text, add_special_tokens=False)
        if not line or joined.ids[: len(line)] != line:
            alone = backend.encode(text, add_special_tokens=False)
            return [(token, start) for token, (start, _) in zip(alone.ids, alone.offsets, strict=True)]
        pairs = zip(joined.ids, joined.offsets, strict=True)
        return [(token, max(0, start - 1)) for token, (start, _) in pairs][len(line) :]
    finally:
        backend.encode_special_tokens = False


def _with_mask(encoding: Encoding, chat: RenderedChat) -> EncodedConversation:
    """Return the ids with a mask of those that begin within a reply."""
    mask = np.zeros(len(encoding), dtype=np.bool_)
    for begin, stop in chat.replies:
        mask[_first_token(encoding, chat.text, begin) : _first_token(encoding, chat.text, stop)] = True
    return EncodedConversation(np.array(encoding.ids, dtype=np.uint32), mask)


def _first_token(encoding: Encoding, text: str, position: int) -> int:
    """Return the index of the first token that begins at a character or after it."""
    for character in range(position, len(text)):
        token = encoding.char_to_token(character)
        if token is not None:  # a normalizer may have dropped the character
            begin, _ = encoding.token_to_chars(token) or (character, 0)
            return token if begin >= position else token + 1
    return len(encoding)
