"""What a run minimises: sums of token losses with their weights, never means, so that any split of a batch adds up."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fgpt_hf.data.batches import IGNORED


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


def token_losses(states: Tensor, embeddings: Tensor, labels: Tensor) -> Tensor:
    """`cross_entropy(states @ embeddings.T, labels, reduction="none")`, `(N,)` float32, zero where a row is ignored.

    As lean as `summed_cross_entropy`, for losses whose sum is not what is minimised: since their weights are known only
    afterwards, the backward pass forms the logits again.
    """
    scored = labels != IGNORED
    losses = _TokenLosses.apply(states[scored], embeddings, labels[scored], _product_dtype(states))
    return losses.new_zeros(len(labels)).masked_scatter(scored, losses)


@torch.no_grad()
def token_scores(states: Tensor, embeddings: Tensor, places: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The losses, `(N,)` float32, of tokens predicted from given states, and whether each is the likeliest token.

    Args:
        states: `(P, D)`; embeddings: `(V, D)`; places: `(N,)` rows of the states; targets: `(N,)` token ids.
    """
    losses = states.new_empty(len(targets), dtype=torch.float32)
    likeliest = torch.empty_like(targets, dtype=torch.bool)
    order = places.argsort()
    ends = places.bincount(minlength=len(states)).cumsum(0).tolist()
    dtype = _product_dtype(states)
    for rows, logits in _logit_chunks(states.to(dtype), embeddings.to(dtype)):
        for part in _parts(logits):
            first, last = rows.start + part.start, rows.start + part.stop
            pairs = order[ends[first - 1] if first else 0 : ends[last - 1]]
            row, target = places[pairs] - first, targets[pairs]
            shifted = logits[part].float()
            shifted -= shifted.amax(dim=1, keepdim=True)  # argmax takes many times as long: it is left to the ties
            target_logits = shifted[row, target]
            greatest = (target_logits == 0).nonzero().squeeze(1)
            likeliest[pairs] = False
            likeliest[pairs[greatest]] = shifted[row[greatest]].argmax(dim=1) == target[greatest]
            losses[pairs] = shifted.exp_().sum(dim=1).log()[row] - target_logits
    return losses, likeliest


class _SummedCrossEntropy(torch.autograd.Function):
    """`apply(states, embeddings, labels, dtype of the products)`, with every label scored."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, embeddings: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
        losses, *gradients = _losses_and_gradients(states, embeddings, labels, dtype, ctx.needs_input_grad[:2])
        ctx.save_for_backward(*gradients)
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        # In place: nothing else holds these, and a second matrix of the embeddings' size would double their memory.
        states_grad, embeddings_grad = (None if grad is None else grad.mul_(upstream) for grad in ctx.saved_tensors)
        return states_grad, embeddings_grad, None, None


def logit_rows(device: str, dtype: torch.dtype) -> int:
    """Rows whose logits exist at once: enough for full matrix speed, in a fraction of a model's own memory."""
    if device == "cpu":
        return 1024 if dtype == torch.float32 else 512  # each where more are no faster
    return 4096


def softmax_rows(device: str) -> int:
    """Rows whose softmax is formed at once, in float32: on a CPU as many as fit its cache."""
    return 16 if device == "cpu" else 4096


class _TokenLosses(torch.autograd.Function):
    """`apply(states, embeddings, labels, dtype of the products)`, with every label scored."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, embeddings: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(states, embeddings, labels)
        ctx.dtype = dtype
        return token_scores(states, embeddings, torch.arange(len(labels), device=labels.device), labels)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        states, embeddings, labels = ctx.saved_tensors
        size = upstream.norm().clamp(min=1e-30)  # what a loss scaler makes of it is more than float16 holds
        _, *gradients = _losses_and_gradients(
            states, embeddings, labels, ctx.dtype, ctx.needs_input_grad[:2], upstream / size
        )
        states_grad, embeddings_grad = (None if grad is None else grad.mul_(size) for grad in gradients)
        return states_grad, embeddings_grad, None, None


def _losses_and_gradients(
    states: Tensor,
    embeddings: Tensor,
    labels: Tensor,
    dtype: torch.dtype,
    wanted: Sequence[bool],
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The losses of the rows, `(N,)` float32, and the gradients of their sum for states and embeddings where wanted.

    In the sum each loss has its weight, `(N,)`, or one.
    """
    losses = states.new_empty(len(states), dtype=torch.float32)
    states_grad = torch.empty_like(states) if wanted[0] else None
    embeddings_grad = torch.zeros_like(embeddings) if wanted[1] else None
    low_states, low_embeddings = states.to(dtype), embeddings.to(dtype)
    for rows, logits in _logit_chunks(low_states, low_embeddings):
        losses[rows] = _to_gradients_(logits, labels[rows])
        if weights is not None:
            logits *= weights[rows, None]
        if states_grad is not None:
            states_grad[rows] = logits @ low_embeddings
        if embeddings_grad is not None:
            _add_product_(embeddings_grad, logits.T, low_states[rows])
    return losses, states_grad, embeddings_grad


def _product_dtype(states: Tensor) -> torch.dtype:
    device = states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype


def _logit_chunks(states: Tensor, embeddings: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the rows with their logits, `(rows, V)`, in one buffer that every chunk uses again."""
    chunk_rows = logit_rows(states.device.type, states.dtype)
    buffer = states.new_empty(min(chunk_rows, len(states)), len(embeddings))
    for rows in _slices(len(states), chunk_rows):
        yield rows, torch.mm(states[rows], embeddings.T, out=buffer[: rows.stop - rows.start])


def _to_gradients_(logits: Tensor, labels: Tensor) -> Tensor:
    """Turn logits, `(N, V)`, into the gradients of their losses in place; return the losses, `(N,)` float32."""
    losses = []
    for part in _parts(logits):
        targets = labels[part, None]
        values = logits[part].float()
        below_greatest = values.amax(dim=1, keepdim=True) - values.gather(1, targets)
        torch.softmax(values, dim=1, out=values)
        # The likeliest token's probability is one over the sum of all; an unlikely target's may have vanished.
        losses.append(below_greatest - values.amax(dim=1, keepdim=True).log())
        logits[part] = values.scatter_add_(1, targets, torch.full_like(below_greatest, -1.0))
    return torch.cat(losses).squeeze(1)


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add `left @ right` to `total`, in place, without another matrix of that size."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
        return
    for rows in _slices(len(total), 8192):
        total[rows] += left[rows] @ right


def _parts(logits: Tensor) -> Iterator[slice]:
    return _slices(len(logits), softmax_rows(logits.device.type))


def _slices(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))
