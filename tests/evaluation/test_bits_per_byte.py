"""Bits per byte: the one loss that compares models with different vocabularies."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from fgpt_hf.data.batches import as_batch
from fgpt_hf.data.packing import pack_documents
from fgpt_hf.evaluation.checks import ValidationLoss, bytes_of_tokens
from fgpt_hf.tokenizer.document_encoder import DocumentEncoder
from fgpt_hf.tokenizer.tokenizer import add_control_tokens, build_tokenizer
from tests.support.tiny import random_model

TEXTS = ["The naïve cat sat ☕ on  the mat.\n\n", "日本語 and <think> a tag", "x" * 30, "<|end|> spelled"]


def byte_level() -> Any:
    """A vocabulary of the bytes and a few merges, with the control tokens, and a token that stands in texts."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("a", "t")]
    tokens = [*characters, *map("".join, merges)]
    tokenizer = add_control_tokens({token: index for index, token in enumerate(tokens)}, merges)
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    return tokenizer


def with_marked_spaces() -> Any:
    """Llama 2's kind: `▁` for a space, and bytes as `<0xE2>` where no token holds them."""
    tokens = [*(f"<0x{byte:02X}>" for byte in range(256)), *"▁thecasonm", "th", "the"]
    model = BPE({token: index for index, token in enumerate(tokens)}, [("t", "h"), ("th", "e")], byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("build", [build_tokenizer, byte_level, with_marked_spaces])
def test_the_bytes_of_a_text_are_those_of_its_tokens(build: Any) -> None:
    tokenizer = build()
    lengths = bytes_of_tokens(tokenizer, len(tokenizer) + 3)
    for text in TEXTS:
        ids = tokenizer(text, split_special_tokens=True, add_special_tokens=False).input_ids
        assert int(lengths[ids].sum()) == len(text.encode())
    assert not lengths[[*tokenizer.all_special_ids, -1, -2, -3]].any()


def test_what_is_measured_is_the_loss_of_each_text_over_its_bytes() -> None:
    tokenizer = byte_level()
    encoder = DocumentEncoder.of(tokenizer)
    model = random_model(vocab_size=320, pad_token_id=encoder.pad, bos_token_id=encoder.start)
    rows = pack_documents(encoder.encode(TEXTS), 64, encoder).ids
    lengths = bytes_of_tokens(tokenizer, 320)
    check = ValidationLoss(1, Accelerator(cpu=True), model, rows, lengths, 2, partial(as_batch, encoder=encoder))
    nats = 0.0
    for ids in encoder.encode(TEXTS):
        row = torch.tensor([[encoder.start, *ids.tolist()]])
        with torch.no_grad():
            predictions = model(row).logits[0, :-1].log_softmax(dim=-1)
        nats -= float(predictions.gather(1, row[0, 1:, None]).sum())
    expected = nats / math.log(2) / sum(len(text.encode()) for text in TEXTS)
    assert check(1)["eval_bits_per_byte"] == pytest.approx(expected, rel=1e-4)
