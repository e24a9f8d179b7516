"""What a model is worth: its loss on held-out text, and what it writes."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fgpt_hf.batches import Ids, as_batch
from fgpt_hf.objectives import next_token_prediction, token_losses

DECODINGS: dict[str, dict[str, Any]] = {"greedy": {"do_sample": False}, "sampled": {"do_sample": True, "top_k": 50}}


@torch.no_grad()
def held_out_loss(
    accelerator: Accelerator, model: PreTrainedModel, rows: Ids, bytes_of_token: Tensor, batch_size: int
) -> dict[str, float]:
    """Mean loss per token and bits per byte of text on packed rows, `(N, T)`, shared among all processes.

    `eval_loss` is in nats and counts every token, the `<|endoftext|>` that ends a document included.
    `eval_bits_per_byte` is the loss of the tokens that stand for text, in bits, over the bytes that they stand for.
    """
    totals = torch.zeros(4, dtype=torch.float64)  # nats, tokens, nats of text, bytes
    own = rows[accelerator.process_index :: accelerator.num_processes]
    for start in range(0, len(own), batch_size):
        batch = {
            name: tensor.to(accelerator.device) for name, tensor in as_batch(own[start : start + batch_size]).items()
        }
        with accelerator.autocast():
            states, embeddings, labels = next_token_prediction(model, batch)
            losses = token_losses(states, embeddings, labels).double().cpu()
        labels = labels.cpu()
        text_bytes = torch.where(labels < 0, 0, bytes_of_token[labels.clamp(min=0)])
        totals += torch.stack([losses.sum(), (labels >= 0).sum(), losses[text_bytes > 0].sum(), text_bytes.sum()])
    nats, tokens, text_nats, text_bytes = accelerator.reduce(totals.to(accelerator.device)).tolist()
    return {"eval_loss": nats / tokens, "eval_bits_per_byte": text_nats / math.log(2) / text_bytes}


def bytes_of_tokens(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> Tensor:
    """How many bytes of text each id stands for, `(vocabulary,)`: none for control tokens and unused ids."""
    lengths = torch.zeros(vocabulary, dtype=torch.int64)
    for token, index in tokenizer.get_vocab().items():
        if index not in tokenizer.all_special_ids:
            lengths[index] = len(token)  # byte-level BPE writes each byte as one character
    return lengths


def sample(
    accelerator: Accelerator,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    seed: int,
    max_new_tokens: int = 48,
) -> list[dict[str, str]]:
    """What the model writes after each prompt: `prompt`, `greedy` (likeliest tokens) and `sampled` (top-k 50)."""
    samples = []
    for prompt in prompts:
        inputs = tokenizer([tokenizer.eos_token + prompt], return_tensors="pt").to(accelerator.device)
        line = {"prompt": prompt}
        for name, decoding in DECODINGS.items():
            torch.manual_seed(seed)
            with accelerator.autocast():
                output = model.generate(**inputs, **decoding, max_new_tokens=max_new_tokens)  # type: ignore[operator]
            written = output[0, inputs["input_ids"].shape[1] :]
            line[name] = str(tokenizer.decode(written, skip_special_tokens=True))
        samples.append(line)
    return samples
