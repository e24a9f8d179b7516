"""Byte-level BPE by tiktoken: the ids that the `tokenizers` library gives, several times faster.

tiktoken computes the same merges outside Python's lock, so threads share the work. It takes no list of merges: it
merges any two neighbors that make a token of the vocabulary, the token of the lowest id first. `tiktoken_rules` proves
that this comes to the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import tiktoken
from tokenizers import Tokenizer
from tokenizers.normalizers import NFC

from fgpt_hf.tokenizer.surrogates import repair_surrogates

Ids = npt.NDArray[np.unsignedinteger[Any]]

# GPT-2's pattern ends in `\s+(?!\S)|\s+`: of the white space before a word, the last character goes to the word. This
# pattern has no such look-ahead and matches twice as fast. It gives the same pieces if the text is cut there before.
GPT2_PIECES = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+"
_SPACES = [*range(9, 14), 0x20, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000]
_IS_SPACE = np.isin(np.arange(_SPACES[-1] + 2), _SPACES)  # by code point; the last entry stands for all greater ones
# The same with each digit alone: `tokenizers` takes digits out first, so white space before one ends its text. It knows
# the digits of Unicode 17; tiktoken 0.14 does not.
NUMBERS = r"\p{N}\x{11DE0}-\x{11DE9}\x{16FF4}-\x{16FF6}"
_DIGITS_APART = rf"'(?:[sdmt]|ll|ve|re)| ?\p{{L}}+|[{NUMBERS}]| ?[^\s\p{{L}}{NUMBERS}]+|\s+(?![^\s{NUMBERS}])|\s+"
# The patterns of Llama 3, Qwen, GPT-4 and their kind, by part. Both libraries read these parts alike, and know the same
# letters, numbers and spaces. Not so `\p{N}{1,3}+`: one of them repeats it, the other takes it without going back.
_PATTERN_PARTS = (
    (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"'(?i:[sdmt]|ll|ve|re)"),
    (r"[^\r\n\p{L}\p{N}]?\p{L}+", r"[^\r\n\p{L}\p{N}]?+\p{L}+", r"[^\r\n\p{L}\p{N}]?+\p{L}++"),
    (r"\p{N}", r"\p{N}{1,2}", r"\p{N}{1,3}"),
    (r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]++[\r\n]*", r" ?[^\s\p{L}\p{N}]++[\r\n]*+"),
    (r"\s*[\r\n]+", r"\s*[\r\n]"),
    (r"\s+(?!\S)|\s+",),
)
_KNOWN_PATTERN = re.compile(r"\|".join(f"(?:{'|'.join(map(re.escape, choices))})" for choices in _PATTERN_PARTS))
_MOST_SPACES = 100_000  # in a row: tiktoken's stack overflows at a million
# Where to cut, and where a document ends: code points that Unicode never assigns, with ids that no token has.
_CUT, _END = "\U000ffffe", "\U000fffff"
_CUT_ID, _END_ID = 2**31, 2**31 + 1


class TiktokenRules(NamedTuple):
    """All that tiktoken needs to give a tokenizer's ids.

    Attributes:
        ranks: the id of each token by its bytes.
        pattern: the pieces that a text is divided into; `GPT2_PIECES` for a text that was cut.
        normalize: what changes a text before, if anything does.
    """

    ranks: Mapping[bytes, int]
    pattern: str = GPT2_PIECES
    normalize: Callable[[str], str] | None = None


class ByteBPE:
    """The pieces of a text, and their merges.

    Args:
        rules: how text is divided, and its tokens.
        encode: the tokenizer itself, for texts that tiktoken cannot take: with the literals, with code points that this
            class uses, or with very much white space in a row.
        literals: texts that the tokenizer reads as one token each, such as `<think>`.

    Example:
        >>> single_bytes = {bytes([byte]): byte for byte in range(256)}
        >>> bpe = ByteBPE(TiktokenRules({**single_bytes, b"ab": 256}), encode=lambda text: [])
        >>> [ids.tolist() for ids in bpe.encode_batch(["ab", "cab"], np.dtype(np.uint16))]
        [[256], [99, 256]]
    """

    def __init__(
        self, rules: TiktokenRules, encode: Callable[[str], Sequence[int]], literals: Sequence[str] = ()
    ) -> None:
        self._rules, self._encode = rules, encode
        self._exceptions = (_CUT, _END, *literals)
        self._spaces = re.compile(rf"\s{{{_MOST_SPACES}}}")
        special = {_CUT: _CUT_ID, _END: _END_ID}
        self._encoding = tiktoken.Encoding(
            "bytes", pat_str=rules.pattern, mergeable_ranks=dict(rules.ranks), special_tokens=special
        )

    def encode_batch(self, texts: Sequence[str], dtype: np.dtype[Any]) -> list[Ids]:
        """Return the ids of each text, from one call for all that tiktoken can take."""
        texts = repair_surrogates(texts)
        normalized = texts if self._rules.normalize is None else list(map(self._rules.normalize, texts))
        pairs = list(zip(texts, normalized, strict=True))
        fast = [not (self._is_exception(text) or self._is_exception(changed)) for text, changed in pairs]
        joined = "".join(text + _END for text, is_fast in zip(normalized, fast, strict=True) if is_fast)
        if self._rules.pattern == GPT2_PIECES:
            joined = _insert_cuts(joined)
        ids = self._encoding.encode_to_numpy(joined, allowed_special={_CUT, _END}, disallowed_special=())
        ids = ids[ids != _CUT_ID]
        parts = iter(np.split(ids, np.flatnonzero(ids == _END_ID) + 1))
        return [
            next(parts)[:-1].astype(dtype) if is_fast else np.array(self._encode(text), dtype)
            for text, is_fast in zip(texts, fast, strict=True)
        ]

    def _is_exception(self, text: str) -> bool:
        if any(exception in text for exception in self._exceptions):
            return True
        is_long = len(text) >= _MOST_SPACES and self._rules.pattern != GPT2_PIECES
        return is_long and self._spaces.search(text) is not None


def tiktoken_rules(rules: str) -> TiktokenRules | None:
    """Return the rules by which `ByteBPE` gives a tokenizer's ids for any text; None where that is not certain.

    Text must be divided by a known pattern into pieces of bytes. Let every merge make a token of its own, ids rise in
    the order of the merges, and every token encode to itself. Then tiktoken makes the same merges: take the first one
    that the tokenizer would not make. It joins two neighbors to a token t, and no earlier merge crossed their outer
    ends, so the merges between these ends were those of t alone; they would continue with the one merge that makes t.

    Args:
        rules: the tokenizer as `tokenizers` writes it in JSON.

    Example:
        >>> from fgpt_hf.tokenizer.tokenizer import build_tokenizer
        >>> tokenizer = build_tokenizer().backend_tokenizer
        >>> tiktoken_rules(tokenizer.to_str()).ranks[b" the"] == tokenizer.token_to_id("\u0120the")
        True
    """
    parts = json.loads(rules)
    model, pattern = parts["model"], _pattern_of(parts["pre_tokenizer"])
    is_known = (parts["normalizer"] or {"type": "NFC"}) == {"type": "NFC"}
    if pattern is None or not is_known or not _is_plain_bpe(model):
        return None
    vocabulary: Mapping[str, int] = model["vocab"]
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    merged = ["".join(merge) for merge in merges]
    byte_of = _bytes_by_character()
    ids = [vocabulary.get(token, -1) for token in merged]
    if ids != sorted(set(ids)) or -1 in ids or not byte_of.keys() <= vocabulary.keys():
        return None
    if model.get("ignore_merges") and len(vocabulary) > len(byte_of) + len(merged):
        return None  # a piece that is a token without a merge would be one
    if not set().union(*merged) <= byte_of.keys() or not _encode_to_themselves(parts, merged, ids):
        return None
    ranks = {bytes(byte_of[character] for character in token): vocabulary[token] for token in (*byte_of, *merged)}
    return TiktokenRules(ranks, pattern, NFC().normalize_str if parts["normalizer"] else None)


def _pattern_of(pre_tokenizer: Mapping[str, Any] | None) -> str | None:
    """Return the pattern of the pieces into which a tokenizer divides text, or None for one that is not known."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer or {}])
    *before, last = steps or [{}]
    if last.get("type") != "ByteLevel" or last["add_prefix_space"] or len(before) > 1:
        return None
    divides = last.get("use_regex", True)
    if not before:
        return GPT2_PIECES if divides else None
    (first,) = before
    if first["type"] == "Digits":
        return _DIGITS_APART if divides and first["individual_digits"] else None
    if divides or first["type"] != "Split" or first["behavior"] != "Isolated" or first["invert"]:
        return None
    pattern = first["pattern"].get("Regex", "")
    return pattern if _KNOWN_PATTERN.fullmatch(pattern) else None


def _is_plain_bpe(model: Mapping[str, Any]) -> bool:
    """Return whether merges alone decide how the bytes of a piece become tokens."""
    changes = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    return model.get("type", "BPE") == "BPE" and not any(model.get(name) for name in changes)


def _encode_to_themselves(parts: Mapping[str, Any], tokens: Sequence[str], ids: Sequence[int]) -> bool:
    others = dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor"))
    only_merges = {**parts, **others, "added_tokens": [], "model": {**parts["model"], "ignore_merges": False}}
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
