"""Fuse the output head with cross-entropy, chunk by chunk, so that the logits of a batch never exist at once.

Logits are `states @ embeddings.T`, or with a softcap c, `c tanh(states @ embeddings.T / c)` (Gemma Team 2024,
arXiv:2408.00118).

Legend: N rows (tokens to predict), V vocabulary, D width, P states that one or more targets are predicted from.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from fgpt_hf.data.batch_fields import IGNORED


def logit_softcap(model: PreTrainedModel) -> float | None:
    """Return the number at which a model's configuration caps its logits, or None."""
    softcap: float | None = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return softcap


def softcapped(logits: Tensor, softcap: float | None) -> Tensor:
    """Cap logits smoothly at plus and minus a number, as models do.

    Example:
        >>> softcapped(torch.tensor([0.1, 100.0]), 15)
        tensor([ 0.1000, 15.0000])
    """
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def summed_cross_entropy(
    states: Tensor,
    embeddings: Tensor,
    labels: Tensor,
    softcap: float | None = None,
    log_weights: Tensor | None = None,
) -> Tensor:
    """Return the sum of `cross_entropy(logits, labels)` over scored rows, in nats, a float32 scalar.

    Loss and both gradients are formed in the forward pass, chunk by chunk, in buffers that every chunk uses again.
    Matrix products take autocast's type, or else that of `states`; softmax and sums are float32.

    Args:
        states: `(N, D)`, final hidden states.
        embeddings: `(V, D)`, the output head's weight.
        labels: `(N,)`, token ids, or `IGNORED` where a row is not scored.
        softcap: the number at which logits are smoothly capped.
        log_weights: `(V,)`, float32, what is added to the logits: the logarithm of how many tokens each one stands for.

    Example:
        >>> states, embeddings = torch.zeros(3, 8), torch.zeros(100, 8)
        >>> summed_cross_entropy(states, embeddings, torch.tensor([1, 2, IGNORED]))  # 2 log(100)
        tensor(9.2103)
    """
    states, labels, scored = _scored_rows(states, labels)
    total: Tensor = _SummedCrossEntropy.apply(
        states, embeddings, labels, product_dtype(states), softcap, scored, log_weights
    )
    return total


def token_losses(states: Tensor, embeddings: Tensor, labels: Tensor, softcap: float | None = None) -> Tensor:
    """Return `cross_entropy(logits, labels, reduction="none")`, `(N,)` float32, zero on ignored rows.

    Takes as little memory as `summed_cross_entropy`, and suits losses that are a function of these, such as preference
    losses. The weight of each row is known only in the backward pass, which therefore forms the logits again.

    Args:
        states: `(N, D)`, final hidden states.
        embeddings: `(V, D)`, the output head's weight.
        labels: `(N,)`, token ids, or `IGNORED` where a row is not scored.
        softcap: the number at which logits are smoothly capped.

    Example:
        >>> token_losses(torch.zeros(2, 8), torch.zeros(100, 8), torch.tensor([7, IGNORED]))
        tensor([4.6052, 0.0000])
    """
    is_scored = labels != IGNORED
    states, labels, unselected = _scored_rows(states, labels)
    losses: Tensor = _TokenLosses.apply(states, embeddings, labels, product_dtype(states), softcap)
    if unselected is not None:
        return losses.masked_fill(~is_scored, 0.0)
    return losses.new_zeros(len(is_scored)).masked_scatter(is_scored, losses)


def _scored_rows(states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the scored rows, and None; on a GPU all rows, the others with zero states, and which are scored, `(N,)`.

    There a selection would make the host wait for their number, and give each batch another shape.
    """
    scored = labels != IGNORED
    if states.device.type == "cpu":
        return states[scored], labels[scored], None
    return states.masked_fill(~scored[:, None], 0.0), labels.clamp(min=0), scored


@torch.no_grad()
def token_scores(
    states: Tensor, embeddings: Tensor, state_of_target: Tensor, targets: Tensor, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Return the loss of each target, `(N,)` float32, and whether it is the likeliest token, `(N,)` bool.

    Args:
        states: `(P, D)`, final hidden states.
        embeddings: `(V, D)`, the output head's weight.
        state_of_target: `(N,)`, the index of the state that predicts each target.
        targets: `(N,)`, token ids.
        softcap: the number at which logits are smoothly capped.
    """
    losses = states.new_empty(len(targets), dtype=torch.float32)
    likeliest = torch.empty_like(targets, dtype=torch.bool)
    order = state_of_target.argsort()
    ends = state_of_target.bincount(minlength=len(states)).cumsum(0).tolist()
    dtype = product_dtype(states)
    for chunk, _, logits in _logit_chunks(states.to(dtype), embeddings.to(dtype)):
        for part in _softmax_parts(logits[: chunk.stop - chunk.start]):
            first, last = chunk.start + part.start, chunk.start + part.stop
            here = order[ends[first - 1] if first else 0 : ends[last - 1]]
            row, target = state_of_target[here] - first, targets[here]
            shifted = logits[part].float()
            _cap_(shifted, softcap)
            shifted -= shifted.amax(dim=1, keepdim=True)  # argmax is many times slower, so only ties ask for it
            target_logits = shifted[row, target]
            greatest = (target_logits == 0).nonzero().squeeze(1)
            likeliest[here] = False
            likeliest[here[greatest]] = shifted[row[greatest]].argmax(dim=1) == target[greatest]
            losses[here] = shifted.exp_().sum(dim=1).log()[row] - target_logits
    return losses, likeliest


def product_dtype(operand: Tensor) -> torch.dtype:
    """Return the type of matrix products with `operand`: autocast's where it is on, else the operand's own."""
    device = operand.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else operand.dtype


def logit_rows(device: str, dtype: torch.dtype) -> int:
    """Return the number of rows whose logits exist at once: enough for full speed, little next to a model's memory."""
    if device == "cpu":
        return 1024 if dtype == torch.float32 else 512  # more rows are no faster
    return 4096


def padded_length(length: int, device: str, dtype: torch.dtype) -> int:
    """Return how many rows a product of `length` rows is padded to, where each new shape would cost memory.

    oneDNN, which multiplies low-precision matrices on a CPU, keeps compiled code for each shape that it met, megabytes
    for each, up to a thousand shapes. So lengths are rounded up there, to one of four in each doubling.

    Example:
        >>> [padded_length(length, "cpu", torch.bfloat16) for length in (1, 17, 65, 250, 257, 512)]
        [16, 32, 80, 256, 320, 512]
        >>> padded_length(257, "cpu", torch.float32), padded_length(257, "cuda", torch.bfloat16)
        (257, 257)
    """
    if device != "cpu" or dtype == torch.float32:
        return length
    multiple = max(16, (1 << (length - 1).bit_length()) >> 3)
    return -(-length // multiple) * multiple


def softmax_rows(device: str) -> int:
    """Return the number of rows whose float32 softmax exists at once: on a CPU, as many as fit its cache."""
    return 16 if device == "cpu" else 4096


class _SummedCrossEntropy(torch.autograd.Function):
    """`apply(states, embeddings, labels, product_dtype, softcap, scored, log_weights)`.

    Rows that are not `scored`, whose states are zero, add nothing; None means all rows.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        embeddings: Tensor,
        labels: Tensor,
        dtype: torch.dtype,
        softcap: float | None,
        scored: Tensor | None,
        log_weights: Tensor | None,
    ) -> Tensor:
        wanted = ctx.needs_input_grad[:2]
        losses, *gradients = _losses_and_gradients(
            states, embeddings, labels, dtype, softcap, wanted, log_weights=log_weights
        )
        ctx.save_for_backward(*gradients)
        return losses.sum() if scored is None else losses.masked_fill(~scored, 0.0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None, None]:
        # In place: nothing else holds these, and a second matrix of the embeddings' size would double their memory.
        states_grad, embeddings_grad = (None if grad is None else grad.mul_(upstream) for grad in ctx.saved_tensors)
        return states_grad, embeddings_grad, None, None, None, None, None


class _TokenLosses(torch.autograd.Function):
    """`apply(states, embeddings, labels, product_dtype, softcap)`, the loss of every row."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, embeddings: Tensor, labels: Tensor, dtype: torch.dtype, softcap: float | None
    ) -> Tensor:
        ctx.save_for_backward(states, embeddings, labels)
        ctx.dtype, ctx.softcap = dtype, softcap
        return _losses(states, embeddings, labels, dtype, softcap)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        states, embeddings, labels = ctx.saved_tensors
        size = upstream.norm().clamp(min=1e-30)  # a loss scaler makes gradients larger than float16 holds
        _, *gradients = _losses_and_gradients(
            states, embeddings, labels, ctx.dtype, ctx.softcap, ctx.needs_input_grad[:2], upstream / size
        )
        states_grad, embeddings_grad = (None if grad is None else grad.mul_(size) for grad in gradients)
        return states_grad, embeddings_grad, None, None, None


def _losses(states: Tensor, embeddings: Tensor, labels: Tensor, dtype: torch.dtype, softcap: float | None) -> Tensor:
    """Return the losses, `(N,)` float32."""
    losses = states.new_empty(len(states), dtype=torch.float32)
    for chunk, _, logits in _logit_chunks(states.to(dtype), embeddings.to(dtype)):
        for part in _softmax_parts(logits[: chunk.stop - chunk.start]):
            here = slice(chunk.start + part.start, chunk.start + part.stop)
            shifted = logits[part].float()
            _cap_(shifted, softcap)
            shifted -= shifted.amax(dim=1, keepdim=True)
            targets = shifted.gather(1, labels[here, None]).squeeze(1)
            losses[here] = shifted.exp_().sum(dim=1).log() - targets
    return losses


def _losses_and_gradients(
    states: Tensor,
    embeddings: Tensor,
    labels: Tensor,
    dtype: torch.dtype,
    softcap: float | None,
    wanted: Sequence[bool],
    weights: Tensor | None = None,
    log_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the losses, `(N,)` float32, and the gradients of their sum for states and embeddings where `wanted`.

    `weights`, `(N,)`, multiply the losses in that sum; `log_weights`, `(V,)`, are added to the logits.
    """
    losses = states.new_empty(len(states), dtype=torch.float32)
    states_grad = torch.empty_like(states) if wanted[0] else None
    embeddings_grad = torch.zeros_like(embeddings) if wanted[1] else None
    low_states, low_embeddings = states.to(dtype), embeddings.to(dtype)
    for chunk, chunk_states, logits in _logit_chunks(low_states, low_embeddings):
        rows = chunk.stop - chunk.start
        losses[chunk] = _to_gradients_(logits[:rows], labels[chunk], softcap, log_weights)
        logits[rows:] = 0  # padding adds nothing
        if weights is not None:
            logits[:rows] *= weights[chunk, None]
        if states_grad is not None:
            states_grad[chunk] = (logits @ low_embeddings)[:rows]
        if embeddings_grad is not None:
            _add_product_(embeddings_grad, logits.T, chunk_states)
    return losses, states_grad, embeddings_grad


def _logit_chunks(states: Tensor, embeddings: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield slices of the rows with their states and logits, in one buffer that the next chunk overwrites.

    Both may end in rows of padding, beyond the slice, whose states are zero.
    """
    device, dtype = states.device.type, states.dtype
    chunk_rows = logit_rows(device, dtype)
    buffer = states.new_empty(padded_length(min(chunk_rows, len(states)), device, dtype), len(embeddings))
    for chunk in _slices(len(states), chunk_rows):
        rows = chunk.stop - chunk.start
        chunk_states = states[chunk]
        if padding := padded_length(rows, device, dtype) - rows:
            chunk_states = nn.functional.pad(chunk_states, (0, 0, 0, padding))
        yield chunk, chunk_states, torch.mm(chunk_states, embeddings.T, out=buffer[: rows + padding])


def _to_gradients_(logits: Tensor, labels: Tensor, softcap: float | None, log_weights: Tensor | None) -> Tensor:
    """Turn products, `(N, V)`, into the gradients of their losses in place; return the losses, `(N,)` float32."""
    losses = []
    for part in _softmax_parts(logits):
        targets = labels[part, None]
        values = logits[part].float()
        slopes = _cap_(values, softcap)
        if log_weights is not None:
            values += log_weights
        below_greatest = values.amax(dim=1, keepdim=True) - values.gather(1, targets)
        torch.softmax(values, dim=1, out=values)
        # The greatest probability is exp(0) over the sum, so its log gives the sum even where the target's underflows.
        losses.append(below_greatest - values.amax(dim=1, keepdim=True).log())
        values.scatter_add_(1, targets, torch.full_like(below_greatest, -1.0))
        logits[part] = values if slopes is None else values.mul_(slopes)
    return torch.cat(losses).squeeze(1)


def _cap_(logits: Tensor, softcap: float | None) -> Tensor | None:
    """Cap logits in place; return the derivatives of that, or None without a softcap."""
    if softcap is None:
        return None
    slopes = 1 - logits.div_(softcap).tanh_().square()
    logits.mul_(softcap)
    return slopes


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add `left @ right` to `total` in place, without another matrix of that size."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
        return
    for rows in _slices(len(total), 8192):
        total[rows] += left[rows] @ right


def _softmax_parts(logits: Tensor) -> Iterator[slice]:
    return _slices(len(logits), softmax_rows(logits.device.type))


def _slices(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))
