"""Byte-level BPE by tiktoken: the ids that the `tokenizers` library gives, several times faster.

tiktoken computes the same merges outside Python's lock, so threads share the work. It takes no list of merges: it
merges whatever two neighbors make a token of the vocabulary, the token of the lowest id first. `equal_ranks` proves
that this comes to the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import tiktoken
from tokenizers import Tokenizer

from fgpt_hf.tokenizer.surrogates import repair_surrogates

Ids = npt.NDArray[np.unsignedinteger[Any]]

# GPT-2's pattern ends in `\s+(?!\S)|\s+`: of the white space before a word, the last character goes to the word. This
# pattern has no such look-ahead and matches twice as fast. It gives the same pieces if the text is cut there before.
_PIECES = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+"
_SPACES = [*range(9, 14), 0x20, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000]
_IS_SPACE = np.isin(np.arange(_SPACES[-1] + 2), _SPACES)  # by code point; the last entry stands for all greater ones
# Where to cut, and where a document ends: code points that Unicode never assigns, with ids that no token has.
_CUT, _END = "\U000ffffe", "\U000fffff"
_CUT_ID, _END_ID = 2**31, 2**31 + 1


class ByteBPE:
    """GPT-2's way to divide text, and the merges of any vocabulary.

    Args:
        ranks: the id of each token by its bytes.
        literals: texts that the tokenizer reads as one token each, such as `<think>`.
        encode: the tokenizer itself, for texts that hold one of those, or code points that this class uses.

    Example:
        >>> single_bytes = {bytes([byte]): byte for byte in range(256)}
        >>> bpe = ByteBPE({**single_bytes, b"ab": 256}, encode=lambda text: [])
        >>> [ids.tolist() for ids in bpe.encode_batch(["ab", "cab"], np.dtype(np.uint16))]
        [[256], [99, 256]]
    """

    def __init__(
        self, ranks: Mapping[bytes, int], encode: Callable[[str], Sequence[int]], literals: Sequence[str] = ()
    ) -> None:
        self._exceptions, self._encode = (_CUT, _END, *literals), encode
        self._encoding = tiktoken.Encoding(
            "bytes", pat_str=_PIECES, mergeable_ranks=dict(ranks), special_tokens={_CUT: _CUT_ID, _END: _END_ID}
        )

    def encode_batch(self, texts: Sequence[str], dtype: np.dtype[Any]) -> list[Ids]:
        """Return the ids of each text, from one call for all of them."""
        if any(exception in text for text in texts for exception in self._exceptions):
            return [np.array(self._encode(repair_surrogates(text)), dtype) for text in texts]
        text = _insert_cuts(repair_surrogates("".join(text + _END for text in texts)))
        ids = self._encoding.encode_to_numpy(text, allowed_special={_CUT, _END}, disallowed_special=())
        ids = ids[ids != _CUT_ID]
        ends = np.flatnonzero(ids == _END_ID)
        return [part[:-1].astype(dtype) for part in np.split(ids, ends + 1)[:-1]]


def equal_ranks(rules: str) -> dict[bytes, int] | None:
    """Return the bytes and ids of a tokenizer's tokens if `ByteBPE` gives its ids for any text; else None.

    Text must be divided by GPT-2's pattern into pieces of bytes. Let every merge make a token of its own, ids rise in
    the order of the merges, and every token encode to itself. Then tiktoken makes the same merges: take the first one
    that the tokenizer would not make. It joins two neighbors to a token t, and no earlier merge crossed their outer
    ends, so the merges between these ends were those of t alone; they would go on with the one merge that makes t.

    Args:
        rules: the tokenizer as `tokenizers` writes it in JSON.

    Example:
        >>> from fgpt_hf.tokenizer.tokenizer import build_tokenizer
        >>> tokenizer = build_tokenizer().backend_tokenizer
        >>> equal_ranks(tokenizer.to_str())[b" the"] == tokenizer.token_to_id("\u0120the")
        True
    """
    parts = json.loads(rules)
    model = parts["model"]
    if not _divides_as_gpt2(parts) or not _is_plain_bpe(model):
        return None
    vocabulary: Mapping[str, int] = model["vocab"]
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    merged = ["".join(merge) for merge in merges]
    byte_of = _bytes_by_character()
    ids = [vocabulary.get(token, -1) for token in merged]
    if ids != sorted(set(ids)) or -1 in ids or not byte_of.keys() <= vocabulary.keys():
        return None
    if not set().union(*merged) <= byte_of.keys() or not _encode_to_themselves(parts, merged, ids):
        return None
    return {bytes(byte_of[character] for character in token): vocabulary[token] for token in (*byte_of, *merged)}


def _divides_as_gpt2(parts: Mapping[str, Any]) -> bool:
    before = parts["pre_tokenizer"] or {}
    is_gpt2 = before.get("type") == "ByteLevel" and before.get("use_regex", True) and not before["add_prefix_space"]
    return bool(is_gpt2) and parts["normalizer"] is None


def _is_plain_bpe(model: Mapping[str, Any]) -> bool:
    """Return whether merges alone decide how the bytes of a piece become tokens."""
    changes = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
    return model.get("type", "BPE") == "BPE" and not any(model.get(name) for name in changes)


def _encode_to_themselves(parts: Mapping[str, Any], tokens: Sequence[str], ids: Sequence[int]) -> bool:
    only_merges = {**parts, "added_tokens": [], "pre_tokenizer": None, "post_processor": None}
    encoded = Tokenizer.from_str(json.dumps(only_merges)).encode_batch_fast(list(tokens), add_special_tokens=False)
    return all(found.ids == [wanted] for found, wanted in zip(encoded, ids, strict=True))


def _bytes_by_character() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for."""
    printable = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


def ranks_of_vocabulary(vocabulary: Mapping[str, int]) -> dict[bytes, int]:
    """Return the bytes and ids of the tokens of a byte-level vocabulary."""
    byte_of = _bytes_by_character()
    return {bytes(byte_of[character] for character in token): rank for token, rank in vocabulary.items()}


def _insert_cuts(text: str) -> str:
    """Put a mark before the last white-space character of each run that a word follows."""
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    space = _IS_SPACE[np.minimum(codes, len(_IS_SPACE) - 1)]
    before_word = space[1:-1] & ~space[2:] & (codes[2:] != ord(_END))
    cuts = np.flatnonzero(space[:-2] & before_word) + 1
    return _CUT.join(text[start:stop] for start, stop in pairwise([0, *cuts.tolist(), len(text)]))
