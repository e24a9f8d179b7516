"""Normalize the training loss over a sample of the vocabulary, where the output head is most of a step's work.

The denominator of the softmax sums over the vocabulary. Here it is estimated, without bias, from fewer tokens (Jean et
al. 2015, arXiv:1412.2007): those that the batch predicts, and others that are drawn anew for each batch, each of which
stands for as many as were left out. Logits and gradients of the other tokens are never computed.

Legend: N rows (tokens to predict), V vocabulary, D width, C tokens of the sample.
"""

import math

import torch
from torch import Tensor

from fgpt_hf.data.batch_fields import IGNORED
from fgpt_hf.losses.linear_cross_entropy import summed_cross_entropy


def sampled_cross_entropy(
    states: Tensor, embeddings: Tensor, labels: Tensor, size: int, softcap: float | None = None
) -> Tensor:
    """Return an estimate of `summed_cross_entropy(states, embeddings, labels, softcap)` from `size` tokens.

    It is exact where the vocabulary is no larger than that. The tokens follow from torch's random numbers.

    Args:
        states: `(N, D)`, final hidden states.
        embeddings: `(V, D)`, the output head's weight.
        labels: `(N,)`, token ids, or `IGNORED` where a row is not scored.
        size: the number of tokens of the sample, C; the tokens to predict are always among them.
        softcap: the number that logits are smoothly bound to.

    Example:
        >>> states, embeddings = torch.zeros(2, 8), torch.zeros(100, 8)
        >>> sampled_cross_entropy(states, embeddings, torch.tensor([1, 2]), size=10)  # 2 log(100)
        tensor(9.2103)
    """
    scored = labels != IGNORED
    states, labels = states[scored], labels[scored]
    targets, positions = labels.unique(return_inverse=True)
    drawn_count = size - len(targets)
    if size >= len(embeddings) or drawn_count <= 0:
        return summed_cross_entropy(states, embeddings, labels, softcap)
    is_other = torch.ones(len(embeddings), dtype=torch.bool, device=labels.device)
    is_other[targets] = False
    others = is_other.nonzero().squeeze(1)
    drawn = others[torch.randperm(len(others), device=labels.device)[:drawn_count]]
    log_weights = torch.zeros(size, device=labels.device)
    log_weights[len(targets) :] = math.log(len(others) / drawn_count)
    sample = embeddings.index_select(0, torch.cat([targets, drawn]))
    return summed_cross_entropy(states, sample, positions, softcap, log_weights)
