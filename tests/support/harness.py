"""How lm-evaluation-harness 0.4.13 and the original FGPT score endings, re-stated one row at a time.

`benchmarks/evaluation.py` compares this project with the real harness.
"""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def harness_score(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context: str, ending: str
) -> tuple[float, bool]:
    """The ending's log-likelihood after the context, and whether greedy decoding would write it."""
    if context == "":
        context_ids, ending_ids = [tokenizer.bos_token_id], tokenizer.encode(ending, add_special_tokens=False)
    else:
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, ending = context[:-spaces], context[-spaces:] + ending
        context_ids = tokenizer.encode(context)
        ending_ids = tokenizer.encode(context + ending)[len(context_ids) :]
    longest = model.config.max_position_embeddings
    ids = torch.tensor((context_ids + ending_ids)[-(longest + 1) :][:-1])
    predictions = model(ids[None]).logits[0, -len(ending_ids) :].log_softmax(dim=-1, dtype=torch.float32)
    targets = torch.tensor(ending_ids)
    chosen = predictions.gather(1, targets[:, None]).sum()
    return float(chosen), bool((predictions.argmax(dim=1) == targets).all())


@torch.no_grad()
def original_choice(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context: str, endings: Sequence[str]
) -> int:
    """The ending with the least mean loss per token: all in one batch padded with zeros, context and ending encoded
    apart.
    """
    context_ids = tokenizer.encode(context)
    encoded = [tokenizer.encode(f" {ending}") for ending in endings]
    length = len(context_ids) + max(map(len, encoded))
    ids, mask = torch.zeros(2, len(endings), length, dtype=torch.long)
    for row, ending_ids in enumerate(encoded):
        end = len(context_ids) + len(ending_ids)
        ids[row, :end] = torch.tensor(context_ids + ending_ids)
        mask[row, len(context_ids) : end] = 1
    logits = model(ids).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return int(((losses * mask[:, 1:]).sum(dim=1) / mask[:, 1:].sum(dim=1)).argmin())
