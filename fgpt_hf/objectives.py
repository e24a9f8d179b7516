"""What a run minimises: sums of token losses with their weights, never means, so that any split of a batch adds up."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fgpt_hf.batches import IGNORED

Batch = Mapping[str, Tensor]


class LanguageModelObjective(nn.Module):
    """The next-token loss of a causal language model on batches of `input_ids`, `position_ids` and `labels`, `(B, T)`.

    As everywhere in transformers, `labels[:, t]` is the token at `t`, predicted from the state at `t - 1`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    @staticmethod
    def weight(batch: Batch) -> Tensor:
        """How many tokens of the batch are scored: what the sum of their losses is to be divided by."""
        return (batch["labels"][:, 1:] != IGNORED).sum()

    def forward(self, batch: Batch) -> Tensor:
        """The sum of the batch's token losses in nats, a float32 scalar."""
        return summed_cross_entropy(*next_token_prediction(self.model, batch))


def next_token_prediction(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """`(states, output embeddings, labels)`, flat: row n of the states, `(N, D)`, predicts row n of the labels."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    states = model.get_decoder()(**inputs, use_cache=False).last_hidden_state
    return states[:, :-1].flatten(0, 1), model.get_output_embeddings().weight, batch["labels"][:, 1:].flatten()


def summed_cross_entropy(states: Tensor, embeddings: Tensor, labels: Tensor) -> Tensor:
    """The sum over scored rows of `cross_entropy(states @ embeddings.T, labels)`, in nats, a float32 scalar.

    The logits of the batch never exist at once: the loss and both gradients are formed in the forward pass, a few rows
    at a time, in buffers that serve every chunk. Matrix products take autocast's type where it is on, else that of
    `states`; the softmax and all sums are float32.

    Args:
        states: `(N, D)`; embeddings: `(V, D)`; labels: `(N,)` token ids, `IGNORED` where a row is not scored.
    """
    scored = labels != IGNORED
    return _SummedCrossEntropy.apply(states[scored], embeddings, labels[scored], _product_dtype(states))


@torch.no_grad()
def token_losses(states: Tensor, embeddings: Tensor, labels: Tensor) -> Tensor:
    """`cross_entropy(states @ embeddings.T, labels, reduction="none")`, `(N,)` float32, zero where a row is ignored."""
    losses = states.new_zeros(len(labels), dtype=torch.float32)
    scored = (labels != IGNORED).nonzero().squeeze(1)
    dtype = _product_dtype(states)
    for rows, logits in _logit_chunks(states[scored].to(dtype), embeddings.to(dtype)):
        losses[scored[rows]] = _exponentiate_(logits, labels[scored[rows], None])[0].squeeze(1)
    return losses


class _SummedCrossEntropy(torch.autograd.Function):
    """`apply(states, embeddings, labels, dtype of the products)`, with every label scored."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, embeddings: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
        total = states.new_zeros((), dtype=torch.float32)
        states_grad = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        weight_grad = torch.zeros_like(embeddings, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        low_states, low_embeddings = states.to(dtype), embeddings.to(dtype)
        for rows, logits in _logit_chunks(low_states, low_embeddings):
            targets = labels[rows, None]
            losses, exponentials, sums = _exponentiate_(logits, targets)
            total += losses.sum()
            logit_grad = exponentials.div_(sums).scatter_add_(1, targets, torch.full_like(sums, -1.0)).to(dtype)
            if states_grad is not None:
                states_grad[rows] = logit_grad @ low_embeddings
            if weight_grad is not None and dtype == torch.float32:
                weight_grad.addmm_(logit_grad.T, low_states[rows])
            elif weight_grad is not None:
                weight_grad += logit_grad.T @ low_states[rows]
        ctx.save_for_backward(states_grad, weight_grad)
        ctx.embeddings_dtype = embeddings.dtype
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        states_grad, weight_grad = ctx.saved_tensors
        return (
            None if states_grad is None else states_grad * upstream.to(states_grad.dtype),
            None if weight_grad is None else (weight_grad * upstream).to(ctx.embeddings_dtype),
            None,
            None,
        )


def _product_dtype(states: Tensor) -> torch.dtype:
    device = states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype


def _logit_chunks(states: Tensor, embeddings: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the rows with their float32 logits, `(rows, V)`, in a buffer that the next chunk overwrites."""
    # Large enough for full matrix speed, small enough that the buffer is a fraction of a model's own memory.
    chunk_rows = 512 if states.device.type == "cpu" else 4096
    product = states.new_empty(min(chunk_rows, len(states)), len(embeddings))
    logits = product if product.dtype == torch.float32 else torch.empty_like(product, dtype=torch.float32)
    for start in range(0, len(states), chunk_rows):
        rows = slice(start, min(start + chunk_rows, len(states)))
        count = rows.stop - rows.start
        torch.mm(states[rows], embeddings.T, out=product[:count])
        yield rows, logits[:count] if logits is product else logits[:count].copy_(product[:count])


def _exponentiate_(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Turn logits into exponentials in place; `(losses (N, 1), exponentials (N, V), their sums (N, 1))`."""
    shifted = logits.sub_(logits.amax(dim=1, keepdim=True))
    target_logits = shifted.gather(1, targets)
    exponentials = shifted.exp_()
    sums = exponentials.sum(dim=1, keepdim=True)
    return sums.log() - target_logits, exponentials, sums
