"""Generate continuations of token prompts in batches, padded on the left."""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

PROMPTS_PER_BATCH = 16


@torch.no_grad()
def generate(
    accelerator: Accelerator, model: PreTrainedModel, prompts: Sequence[Sequence[int]], pad_id: int, **options: Any
) -> list[list[int]]:
    """Return the ids that the model writes after each prompt, in the given order, without the token that ends them.

    `options` are those of `model.generate`. Batches have `PROMPTS_PER_BATCH` prompts in the given order: sort prompts
    by length where padding would cost much.

    Example:
        >>> from fgpt_hf import FGPTConfig, FGPTForCausalLM
        >>> model = FGPTForCausalLM(FGPTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2)).eval()
        >>> prompts = [[5, 6, 7], [8]]
        >>> written = generate(Accelerator(cpu=True), model, prompts, pad_id=50261, max_new_tokens=4, do_sample=False)
        >>> [len(ids) <= 4 for ids in written]
        [True, True]
    """
    batches = [prompts[start : start + PROMPTS_PER_BATCH] for start in range(0, len(prompts), PROMPTS_PER_BATCH)]
    return [ids for batch in batches for ids in _generate_batch(accelerator, model, batch, pad_id, options)]


def _generate_batch(
    accelerator: Accelerator,
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    pad_id: int,
    options: dict[str, Any],
) -> list[list[int]]:
    longest = max(map(len, prompts))
    input_ids = [[pad_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    attention_mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    with accelerator.autocast():
        output = model.generate(  # type: ignore[operator]
            input_ids=torch.tensor(input_ids, device=accelerator.device),
            attention_mask=torch.tensor(attention_mask, device=accelerator.device),
            pad_token_id=pad_id,
            **options,
        )
    ends = _end_ids(model)
    return [_before_first(ends, ids) for ids in output[:, longest:].tolist()]


def _end_ids(model: PreTrainedModel) -> list[int]:
    """Return the tokens at which generation stops."""
    ends = model.generation_config.eos_token_id if model.generation_config else None
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def _before_first(ends: Sequence[int], ids: Sequence[int]) -> list[int]:
    length = next((index for index, token in enumerate(ids) if token in ends), len(ids))
    return list(ids[:length])
