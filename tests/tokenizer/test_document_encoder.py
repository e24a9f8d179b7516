"""Any tokenizer's ids for documents: the fast encoding where it gives the same ones, and control tokens stay text."""

import json
import random
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from fgpt_hf.errors import UserError
from fgpt_hf.tokenizer.byte_bpe import equal_ranks
from fgpt_hf.tokenizer.document_encoder import PROJECT_ENCODER, DocumentEncoder
from fgpt_hf.tokenizer.tokenizer import build_tokenizer
from tests.support.any_models import NAMES, SPECIAL, TEXTS, any_tokenizer
from tests.tokenizer.test_fast_encoding import ODD_TEXTS, random_texts

FAST = {"gpt2": True, "llama": True, "qwen3": False, "smollm3": False, "nanochat": True}


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
        {"model": {"ignore_merges": True}},
        {"model": {"dropout": 0.1}},
    ],
)
def test_other_ways_to_divide_or_merge_text_are_not_encoded_fast(change: dict[str, Any]) -> None:
    rules = json.loads(any_tokenizer("gpt2").backend_tokenizer.to_str())
    assert equal_ranks(json.dumps(rules)) is not None
    for name, value in change.items():
        rules[name] = {**rules[name], **value} if name == "model" else value
    assert equal_ranks(json.dumps(rules)) is None


def test_merges_in_another_order_are_not_encoded_fast() -> None:
    rules = json.loads(any_tokenizer("gpt2").backend_tokenizer.to_str())
    random.Random(0).shuffle(rules["model"]["merges"])
    Tokenizer.from_str(json.dumps(rules))  # still a tokenizer
    assert equal_ranks(json.dumps(rules)) is None
