"""Encode documents for training, with the ids of any tokenizer of the `tokenizers` library.

transformers is not needed to encode documents; processes that only do that start quickly.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from fgpt_hf.errors import UserError
from fgpt_hf.tokenizer.byte_bpe import GPT2_PIECES, ByteBPE, Ids, TiktokenRules, ranks_of_vocabulary, tiktoken_rules
from fgpt_hf.tokenizer.surrogates import repair_surrogates
from fgpt_hf.tokenizer.tokenizer import (
    CONTROL_TOKENS,
    END_OF_TEXT_ID,
    PAD_ID,
    build_tokenizer,
    read_vocabulary,
    tokenizer_fingerprint,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_DOCUMENTS_PER_TASK = 128  # with fewer, handing tasks over costs more than sharing them gains


@dataclass(frozen=True)
class DocumentEncoder:
    """How documents become ids and rows of ids: all that a process needs to make them.

    Attributes:
        start: the id that each document in a row begins with.
        end: the id that each document ends with, where `start` does not say that the one before has ended.
        pad: the id that fills a row; it may be `start`.
        vocab_size: the number of ids.
        rules: the tokenizer as `tokenizers` writes it in JSON; None for the project's.
        packs: whether a row holds several documents, as many as fit, for models that keep them apart.

    Example:
        >>> encoder = DocumentEncoder.of(build_tokenizer())
        >>> [ids.tolist() for ids in encoder.encode(["Hello, world", "<|end|>"])]
        [[15496, 11, 995], [27, 91, 437, 91, 29]]
    """

    start: int
    end: int | None
    pad: int
    vocab_size: int
    rules: str | None = field(default=None, repr=False)
    packs: bool = True

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> DocumentEncoder:
        """Return the encoder of a tokenizer: documents begin and end as it begins and ends a text.

        A tokenizer that puts its own first token before a text, such as Llama's `<s>`, has documents between that and
        its end of text. One that puts none has the end of text alone, before each document.

        Raises:
            UserError: it has no end of text, or it is not one of the `tokenizers` library.
        """
        if is_project_vocabulary(tokenizer):
            return PROJECT_ENCODER
        backend, end, name = getattr(tokenizer, "backend_tokenizer", None), tokenizer.eos_token_id, _name(tokenizer)
        if not isinstance(backend, Tokenizer):
            raise UserError(
                f"the tokenizer of {name} is a {type(tokenizer).__name__}, not one of the tokenizers library: save it "
                "with a tokenizer.json"
            )
        if not isinstance(end, int):
            raise UserError(
                f"the tokenizer of {name} has no end of text, which separates documents and ends replies: give it an "
                "eos_token in tokenizer_config.json"
            )
        start, pad, begins = tokenizer.bos_token_id, tokenizer.pad_token_id, begins_texts(tokenizer)
        return cls(
            start=start if begins and isinstance(start, int) else end,
            end=end if begins else None,
            pad=pad if isinstance(pad, int) else end,
            vocab_size=max(tokenizer.get_vocab().values()) + 1,
            rules=json.dumps(rules_of(tokenizer)),
        )

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smallest type that holds every id: 16 or 32 bits."""
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    @property
    def fingerprint(self) -> str:
        """A hash of all that the ids in rows follow from."""
        if self == PROJECT_ENCODER:
            return tokenizer_fingerprint()
        rules = self.rules or tokenizer_fingerprint()
        return hashlib.sha256(f"{rules}{self.start} {self.end} {self.pad} {self.packs}".encode()).hexdigest()

    @property
    def is_fast(self) -> bool:
        """Whether tiktoken encodes the documents, because it gives the same ids."""
        return _byte_bpe(self.rules) is not None

    def encode(self, texts: Iterable[str], threads: int | None = None) -> list[Ids]:
        """Return the ids of each text, equal to the tokenizer's own, with `end` after them if there is one.

        Text that spells a control token stays text. A lone surrogate, which UTF-8 cannot encode, becomes U+FFFD.

        Args:
            threads: number of threads; by default one for each core.
        """
        encoded = self._encode(list(texts), threads)
        if self.end is None:
            return encoded
        return [np.append(ids, np.array(self.end, self.dtype)) for ids in encoded]

    def _encode(self, texts: list[str], threads: int | None) -> list[Ids]:
        bpe = _byte_bpe(self.rules)
        if bpe is None:
            assert self.rules is not None
            batch = _backend(self.rules).encode_batch_fast(repair_surrogates(texts), add_special_tokens=False)
            return [np.array(encoding.ids, self.dtype) for encoding in batch]
        tasks = [texts[start : start + _DOCUMENTS_PER_TASK] for start in range(0, len(texts), _DOCUMENTS_PER_TASK)]
        with ThreadPoolExecutor(threads) as pool:  # tiktoken releases Python's lock
            return [ids for task in pool.map(lambda task: bpe.encode_batch(task, self.dtype), tasks) for ids in task]


PROJECT_ENCODER = DocumentEncoder(END_OF_TEXT_ID, None, PAD_ID, max(CONTROL_TOKENS.values()) + 1)


def encode_documents(texts: Iterable[str], threads: int | None = None) -> list[Ids]:
    """Return the ids of each text by the project's tokenizer, as `DocumentEncoder.encode` does.

    Example:
        >>> [ids.tolist() for ids in encode_documents(["Hello, world"])]
        [[15496, 11, 995]]
    """
    return PROJECT_ENCODER.encode(texts, threads)


def is_project_vocabulary(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a tokenizer gives the ids of the project's for any text, and has no other token."""
    project = build_tokenizer()
    return (
        type(tokenizer) is type(project)
        and tokenizer.eos_token_id == END_OF_TEXT_ID
        and tokenizer.pad_token_id == PAD_ID
        and not tokenizer.split_special_tokens
        and rules_of(tokenizer) == rules_of(project)
    )


def begins_texts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a tokenizer puts a token of its own before a text, which is not its end of text."""
    start = tokenizer.bos_token_id
    is_own = start is not None and start != tokenizer.eos_token_id
    return bool(is_own and tokenizer.backend_tokenizer.encode("a").ids[:1] == [start])


def has_byte_bpe(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a tokenizer divides text as GPT-2's does and merges bytes by rank, as tiktoken does."""
    if is_project_vocabulary(tokenizer):
        return True
    rules = tiktoken_rules(json.dumps(rules_of(tokenizer)))
    return rules is not None and rules.pattern == GPT2_PIECES and rules.normalize is None


def rules_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return all that decides the ids of a text: vocabulary, merges, added tokens and every step around them."""
    rules: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return {name: value for name, value in rules.items() if name not in ("padding", "truncation")}


@lru_cache(maxsize=4)
def _backend(rules: str) -> Tokenizer:
    """Return a tokenizer that reads text which spells a control token as text."""
    tokenizer = Tokenizer.from_str(rules)
    tokenizer.encode_special_tokens = True
    return tokenizer


@lru_cache(maxsize=4)
def _byte_bpe(rules: str | None) -> ByteBPE | None:
    """Return the fast encoding of a tokenizer, or None if it might give other ids."""
    if rules is None:
        vocabulary, _ = read_vocabulary()
        del vocabulary["<|endoftext|>"]
        return ByteBPE(TiktokenRules(ranks_of_vocabulary(vocabulary)), _encode_as_project)
    equal = tiktoken_rules(rules)
    if equal is None:
        return None
    literals = [token["content"] for token in json.loads(rules)["added_tokens"] if not token["special"]]
    return ByteBPE(equal, lambda text: _backend(rules).encode(text, add_special_tokens=False).ids, literals)


def _encode_as_project(text: str) -> Sequence[int]:
    ids: list[int] = build_tokenizer().encode(text, split_special_tokens=True, verbose=False)
    return ids


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.name_or_path or "this model"
