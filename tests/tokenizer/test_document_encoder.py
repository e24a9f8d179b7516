"""Any tokenizer's ids for documents: the fast encoding where it gives the same ones, and control tokens stay text."""

import json
import random
from typing import Any

import numpy as np
import pytest
import tiktoken
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from fgpt_hf.errors import UserError
from fgpt_hf.tokenizer.byte_bpe import NUMBERS, tiktoken_rules
from fgpt_hf.tokenizer.document_encoder import PROJECT_ENCODER, DocumentEncoder
from fgpt_hf.tokenizer.surrogates import repair_surrogates
from fgpt_hf.tokenizer.tokenizer import build_tokenizer, read_vocabulary
from tests.support.any_models import NAMES, SPECIAL, TEXTS, any_tokenizer
from tests.tokenizer.test_fast_encoding import ODD_TEXTS, random_texts

FAST = {"gpt2": True, "llama": True, "qwen3": False, "smollm3": True, "nanochat": True}


PATTERNS = {
    "Llama 3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "Qwen 2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "nanochat": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+",
}
HARD_TEXTS = [
    "a  \U00011de0\U00011de1 \U00016ff4b",
    "'S 'ſt DON'T we'LL've",
    "1234567890 ١٢٣ Ⅷ²½",
    "a\t\tb \r\n\r\n  c\n \n",
    "e\u0301 \u1100\u1161 \u212b\u2126",
    " \u30001 x",
]


def split_by(pattern: str) -> dict[str, Any]:
    """The step of Llama 3 and Qwen that divides text, as `tokenizers` writes it."""
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return divided_by(pre_tokenizers.Sequence([split, by_bytes]))


def divided_by(steps: pre_tokenizers.PreTokenizer) -> dict[str, Any]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = steps
    found: dict[str, Any] = json.loads(tokenizer.to_str())["pre_tokenizer"]
    return found


def own_ids(name: str, text: str) -> list[int]:
    tokenizer: Any = any_tokenizer(name)
    ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return ids


@pytest.mark.parametrize("name", NAMES)
def test_ids_equal_the_tokenizers_own(name: str) -> None:
    encoder = DocumentEncoder.of(any_tokenizer(name))
    texts = [*TEXTS[:20], *ODD_TEXTS, *random_texts(300), *SPECIAL, "a<|im_end|>b </s>"]
    ends = [] if encoder.end is None else [encoder.end]
    for text, ids in zip(texts, encoder.encode(texts), strict=True):
        assert ids.tolist() == [*own_ids(name, text), *ends], text
    assert encoder.is_fast == FAST[name]


@pytest.mark.parametrize(
    ("kind", "normalizer"),
    [("Llama 3", None), ("Qwen 2", {"type": "NFC"}), ("nanochat", None), ("digits apart", None)],
)
def test_ids_equal_the_tokenizers_own_with_the_patterns_of_well_known_models(
    kind: str, normalizer: dict[str, str] | None
) -> None:
    vocabulary, merges = read_vocabulary()
    del vocabulary["<|endoftext|>"]
    rules = json.loads(Tokenizer(models.BPE(vocab=vocabulary, merges=merges)).to_str())
    rules["model"]["ignore_merges"] = kind == "Llama 3"
    digits = pre_tokenizers.Digits(individual_digits=True)
    steps = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    rules |= {"pre_tokenizer": split_by(PATTERNS[kind]) if kind in PATTERNS else divided_by(steps)}
    rules |= {"normalizer": normalizer}
    encoder = DocumentEncoder(start=0, end=None, pad=0, vocab_size=len(vocabulary), rules=json.dumps(rules))
    assert encoder.is_fast
    texts = [*HARD_TEXTS, *ODD_TEXTS, *random_texts(400), *[" " * 1_200_000 + "x"] * (kind == "Qwen 2")]
    own = Tokenizer.from_str(json.dumps(rules)).encode_batch(repair_surrogates(texts), add_special_tokens=False)
    for text, found, expected in zip(texts, encoder.encode(texts), own, strict=True):
        assert found.tolist() == expected.ids, text[:99]


def test_both_libraries_know_the_same_letters_numbers_and_spaces() -> None:
    text = "".join(chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    single_bytes = {bytes([byte]): byte for byte in range(256)}
    steps = {
        kind: pre_tokenizers.Split(Regex(f"{kind}+"), "removed", invert=True) for kind in (r"\p{L}", r"\p{N}", r"\s")
    }
    runs = {kind: [run for run, _ in step.pre_tokenize_str(text)] for kind, step in steps.items()}
    runs[f"[{NUMBERS}]"] = [run for run, _ in pre_tokenizers.Digits().pre_tokenize_str(text)][1::2]
    for kind, found in runs.items():
        ids = tiktoken.Encoding("bytes", pat_str=kind, mergeable_ranks=single_bytes, special_tokens={}).encode(text)
        assert set(bytes(ids).decode()) == set("".join(found)), kind


def test_ids_have_16_bits_or_32_as_the_vocabulary_needs() -> None:
    small, large = (DocumentEncoder.of(any_tokenizer(name)) for name in ("gpt2", "qwen3"))
    assert small.encode(["a"])[0].dtype == np.uint16 and large.encode(["a"])[0].dtype == np.uint32
    assert large.start > 1 << 16


def test_documents_begin_and_end_as_the_tokenizer_has_it() -> None:
    llama, gpt2 = (any_tokenizer(name) for name in ("llama", "gpt2"))
    of_llama, of_gpt2 = DocumentEncoder.of(llama), DocumentEncoder.of(gpt2)
    assert (of_llama.start, of_llama.end) == (llama.bos_token_id, llama.eos_token_id)
    assert (of_gpt2.start, of_gpt2.end, of_gpt2.pad) == (gpt2.eos_token_id, None, gpt2.eos_token_id)


def test_the_projects_tokenizer_has_the_projects_encoder() -> None:
    assert DocumentEncoder.of(build_tokenizer()) == PROJECT_ENCODER
    assert len({PROJECT_ENCODER.fingerprint, *(DocumentEncoder.of(any_tokenizer(n)).fingerprint for n in NAMES)}) == 6


def test_a_tokenizer_without_an_end_of_text_is_refused() -> None:
    tokenizer = build_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="has no end of text.*: give it an eos_token in tokenizer_config.json"):
        DocumentEncoder.of(tokenizer)


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        {"pre_tokenizer": None},
        {"pre_tokenizer": split_by(PATTERNS["Llama 3"].replace("{1,3}", "{1,3}+"))},
        {"pre_tokenizer": split_by(PATTERNS["Qwen 2"].replace(r"|\s+(?!\S)|\s+", ""))},
        {"pre_tokenizer": split_by(PATTERNS["Qwen 2"]) | {"pretokenizers": []}},
        {"model": {"ignore_merges": True}},  # its vocabulary has the special tokens, which no merge makes
        {"model": {"dropout": 0.1}},
    ],
)
def test_other_ways_to_divide_or_merge_text_are_not_encoded_fast(change: dict[str, Any]) -> None:
    rules = json.loads(any_tokenizer("gpt2").backend_tokenizer.to_str())
    assert tiktoken_rules(json.dumps(rules)) is not None
    for name, value in change.items():
        rules[name] = {**rules[name], **value} if name == "model" else value
    assert tiktoken_rules(json.dumps(rules)) is None


def test_merges_in_another_order_are_not_encoded_fast() -> None:
    rules = json.loads(any_tokenizer("gpt2").backend_tokenizer.to_str())
    random.Random(0).shuffle(rules["model"]["merges"])
    Tokenizer.from_str(json.dumps(rules))  # still a tokenizer
    assert tiktoken_rules(json.dumps(rules)) is None
