"""What a model writes while it trains: lines for each prompt, alike at every step, and what is measured of them."""

from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from transformers import GenerationConfig

from fgpt_hf import FGPTForCausalLM
from fgpt_hf.evaluation.checks import (
    FIXED_PROMPTS,
    ChatSamples,
    Samples,
    beginning_of,
    fixed_prompts_that_fit,
    prompts_that_fit,
    require_room,
)
from fgpt_hf.tokenizer.tokenizer import GENERATION_IDS
from tests.support.tiny import CONTEXT, random_model, tokenizer


@pytest.fixture
def model() -> FGPTForCausalLM:
    model = random_model()
    model.generation_config = GenerationConfig(**GENERATION_IDS)
    return model


def test_a_sample_depends_on_nothing_but_its_prompt(model: FGPTForCausalLM) -> None:
    lines: list[Any] = []
    accelerator = Accelerator(cpu=True)
    for prompts in (["The cat", "A much longer beginning of a text"], ["The cat"]):
        samples = Samples(1, accelerator, model, tokenizer(), prompts, lines.append, seed=3, max_new_tokens=6)
        assert samples(step=7) == {}
    assert lines[0] == lines[2] and lines[0].keys() == {"step", "prompt", "greedy", "sampled"}
    assert lines[0]["step"] == 7 and lines[1]["prompt"] == "A much longer beginning of a text"


def test_a_sample_is_what_transformers_generates_after_the_end_of_the_last_text(model: FGPTForCausalLM) -> None:
    lines: list[Any] = []
    Samples(1, Accelerator(cpu=True), model, tokenizer(), ["The cat"], lines.append, seed=3, max_new_tokens=6)(0)
    inputs = tokenizer()("<|endoftext|>The cat", return_tensors="pt")
    torch.manual_seed(3)
    written: Any = model.generate(**inputs, do_sample=True, top_k=50, max_new_tokens=6)
    ids = written[0, inputs["input_ids"].shape[1] :]
    assert lines[0]["sampled"] == tokenizer().decode(ids, skip_special_tokens=True)


def test_replies_are_written_and_measured(model: FGPTForCausalLM) -> None:
    lines: list[Any] = []
    system: Any = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
    prompts = [*FIXED_PROMPTS, system]
    measured = ChatSamples(1, Accelerator(cpu=True), model, tokenizer(), prompts, lines.append, 3, 5)(2)
    assert [line["prompt"] for line in lines[:3]] == [
        "What is the capital of France?",
        "What is 2 + 2?",
        "Define 'cat'.",
    ]
    assert lines[3]["prompt"] == "Be kind.\nHello" and {line["step"] for line in lines} == {2}
    assert 0 <= measured["answers_ended"] <= 1 and 0 <= measured["answer_tokens"] <= 5


def test_prompts_without_room_for_a_reply_are_left_out_and_no_fixed_one_is_refused() -> None:
    long: Any = [{"role": "user", "content": "word " * CONTEXT}]
    assert prompts_that_fit(tokenizer(), [long, *FIXED_PROMPTS], CONTEXT, 8) == FIXED_PROMPTS
    assert prompts_that_fit(tokenizer(), [long], CONTEXT, 8) == prompts_that_fit(tokenizer(), [], CONTEXT, 8) == []
    assert fixed_prompts_that_fit(tokenizer(), CONTEXT, 8) == FIXED_PROMPTS
    with pytest.raises(ValueError, match="max_new_tokens=8 leaves no room for a prompt in a context of 12"):
        fixed_prompts_that_fit(tokenizer(), 12, 8)


@pytest.mark.parametrize("context", [6, 9, 32, 49])
def test_a_continuation_ends_where_the_context_does(context: int) -> None:
    lines: list[Any] = []
    model = random_model(max_position_embeddings=context)
    row = np.array(tokenizer()("Ünïcödé 🜂🜁🜄").input_ids, dtype=np.uint16)
    prompts = [
        require_room(tokenizer(), "Once upon a time", context),
        beginning_of(tokenizer(), row, context),
    ]
    Samples(1, Accelerator(cpu=True), model, tokenizer(), prompts, lines.append, seed=3)(0)
    assert [line["prompt"] for line in lines] == prompts
    room = context - len(tokenizer()("<|endoftext|>Once upon a time").input_ids)
    assert len(tokenizer()(lines[0]["greedy"]).input_ids) >= min(room, 1)
