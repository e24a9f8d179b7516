"""What a chat model answers: the same prompts before and after, and how its answers end."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fgpt_hf.evaluation import DECODINGS

Prompt = list[dict[str, Any]]

PROMPTS_PER_BATCH = 16
# Those of the original FGPT.
QUESTIONS: Sequence[Prompt] = [
    [{"role": "user", "content": question}]
    for question in ("What is the capital of France?", "What is 2 + 2?", "Define 'cat'.")
]


def fitting(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], context: int, max_new_tokens: int
) -> list[Prompt]:
    """The prompts that leave a model of this context room for an answer.

    Raises:
        ValueError: there is none.
    """
    encoded: Any = tokenizer.apply_chat_template(list(prompts), add_generation_prompt=True)
    room = context - max_new_tokens
    found = [prompt for prompt, ids in zip(prompts, encoded["input_ids"], strict=True) if len(ids) <= room]
    if not found:
        raise ValueError(f"max_new_tokens={max_new_tokens} leaves no room for a prompt in a context of {context}")
    return found


def answer(
    accelerator: Accelerator,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    seed: int,
    max_new_tokens: int,
) -> tuple[list[dict[str, str]], dict[str, float]]:
    """A line for each prompt, `prompt`, `greedy` (likeliest tokens) and `sampled` (top-k 50), and what to measure.

    `answers_ended` is the share of the greedy answers that end by themselves, `answer_tokens` their mean length.
    """
    lines = [{"prompt": "\n".join(map(_said, prompt))} for prompt in prompts]
    measured: dict[str, float] = {}
    for name, decoding in DECODINGS.items():
        torch.manual_seed(seed)
        options = {**decoding, "max_new_tokens": max_new_tokens}
        answers = [
            ids
            for start in range(0, len(prompts), PROMPTS_PER_BATCH)
            for ids in _written(accelerator, model, tokenizer, prompts[start : start + PROMPTS_PER_BATCH], options)
        ]
        for line, ids in zip(lines, answers, strict=True):
            line[name] = str(tokenizer.decode(ids, skip_special_tokens=True))
        if name == "greedy":
            ended = [len(ids) < max_new_tokens for ids in answers]
            measured = {"answers_ended": fmean(ended), "answer_tokens": fmean(map(len, answers))}
    return lines, measured


def _said(message: Mapping[str, Any]) -> str:
    """A message's text, which may be in parts."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _written(
    accelerator: Accelerator,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    options: Mapping[str, Any],
) -> list[list[int]]:
    """The ids of each answer, without the token that ends it."""
    inputs: Any = tokenizer.apply_chat_template(
        list(prompts), add_generation_prompt=True, padding=True, return_tensors="pt"
    )
    with accelerator.autocast():
        output = model.generate(**inputs.to(accelerator.device), **options)  # type: ignore[operator]
    ends = model.generation_config.eos_token_id  # type: ignore[union-attr]
    answers = output[:, inputs["input_ids"].shape[1] :].tolist()
    return [ids[: next((place for place, token in enumerate(ids) if token in ends), len(ids))] for ids in answers]
