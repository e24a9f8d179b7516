"""Normalize the training loss over a sample of the vocabulary, where the output head is most of a step's work.

The denominator of the softmax sums over the vocabulary. Here it is estimated, without bias, from fewer tokens (Jean et
al. 2015, arXiv:1412.2007): those that the batch predicts, and others drawn afresh for each batch, each of which
stands for as many as were left out. Logits and gradients of the other tokens are never computed.

Legend: N rows (tokens to predict), V vocabulary, D width, C tokens of the sample.
"""

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
        softcap: the number at which logits are smoothly capped.

    Example:
        >>> states, embeddings = torch.zeros(2, 8), torch.zeros(100, 8)
        >>> sampled_cross_entropy(states, embeddings, torch.tensor([1, 2]), size=10)  # 2 log(100)
        tensor(9.2103)
    """
    vocabulary = len(embeddings)
    targets = labels.where(labels != IGNORED, vocabulary)  # one more token, which stands for none
    is_target = torch.zeros(vocabulary + 1, dtype=torch.bool, device=labels.device)
    is_target[targets] = True
    is_target = is_target[:vocabulary]
    count = is_target.sum()
    # The host waits for the count only where there are labels enough to fill the sample.
    if size >= vocabulary or (len(labels) >= size and count >= size):
        return summed_cross_entropy(states, embeddings, labels, softcap)
    priority = torch.rand(vocabulary, device=labels.device).masked_fill(is_target, 2.0)
    sample = priority.topk(size).indices
    log_weight = ((vocabulary - count) / (size - count)).log()
    log_weights = log_weight.masked_fill(is_target[sample], 0.0)
    position = torch.empty(vocabulary + 1, dtype=labels.dtype, device=labels.device)
    position[sample] = torch.arange(size, device=labels.device)
    position[vocabulary] = IGNORED
    return summed_cross_entropy(states, embeddings.index_select(0, sample), position[targets], softcap, log_weights)
