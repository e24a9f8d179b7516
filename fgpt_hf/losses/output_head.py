"""The output head of any causal language model: from final states to losses, never with all logits at once.

Most heads are a product with the output embeddings, perhaps with a softcap, and take the fused loss of
`linear_cross_entropy`. Others have a bias, a scale or code of their own: these compute the logits of some rows at a
time by their `forward`, once for the loss and once more for its gradient.

Legend: N rows (tokens to predict), D width, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from fgpt_hf.data.batch_fields import IGNORED
from fgpt_hf.errors import UserError
from fgpt_hf.losses.linear_cross_entropy import (
    logit_rows,
    logit_softcap,
    product_dtype,
    softcapped,
    summed_cross_entropy,
    token_losses,
)
from fgpt_hf.losses.sampled_softmax import sampled_cross_entropy
from fgpt_hf.model.embeddings import output_embeddings, token_embeddings
from fgpt_hf.model.evaluation_mode import evaluation_mode
from fgpt_hf.model.modeling_fgpt import FGPTForCausalLM

PROBE_TOKENS = 8
TOLERANCE = 1e-4  # of the largest logit


class OutputHead(Protocol):
    """Losses of final states, `(N, D)`, that are to predict labels, `(N,)`; `IGNORED` labels are not scored."""

    def summed_loss(self, states: Tensor, labels: Tensor, sample_size: int | None = None) -> Tensor:
        """Return the sum of the losses in nats, a float32 scalar, or its estimate from a sample of the vocabulary."""

    def token_losses(self, states: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of each row in nats, `(N,)` float32, zero where it is not scored."""


@dataclass(frozen=True)
class ProductHead:
    """A head whose logits are `states @ embeddings.T`, smoothly capped if there is a softcap."""

    model: PreTrainedModel

    def summed_loss(self, states: Tensor, labels: Tensor, sample_size: int | None = None) -> Tensor:
        softcap = logit_softcap(self.model)
        if sample_size is not None:
            return sampled_cross_entropy(states, self.embeddings, labels, sample_size, softcap)
        return summed_cross_entropy(states, self.embeddings, labels, softcap)

    def token_losses(self, states: Tensor, labels: Tensor) -> Tensor:
        return token_losses(states, self.embeddings, labels, logit_softcap(self.model))

    @property
    def embeddings(self) -> Tensor:
        """The output embeddings, `(V, D)`."""
        weight = output_embeddings(self.model)
        assert weight is not None
        return weight


@dataclass(frozen=True)
class OwnHead:
    """A head that computes logits by the model's own code."""

    model: PreTrainedModel

    def summed_loss(self, states: Tensor, labels: Tensor, sample_size: int | None = None) -> Tensor:
        if sample_size is not None:
            name = type(self.model).__name__
            raise UserError(
                f"the output head of a {name} is more than a product, so sampled_softmax={sample_size} cannot estimate "
                "its loss: leave it out, or choose a preset without it"
            )
        return self.token_losses(states, labels).sum()

    def token_losses(self, states: Tensor, labels: Tensor) -> Tensor:
        scored = labels != IGNORED
        size = logit_rows(states.device.type, product_dtype(states))
        parts = zip(states[scored].split(size), labels[scored].split(size), strict=True)
        losses = [checkpoint(self._losses, *part, use_reentrant=False) for part in parts]
        return states.new_zeros(len(labels), dtype=torch.float32).masked_scatter(
            scored, torch.cat(losses) if losses else states.new_zeros(0, dtype=torch.float32)
        )

    def _losses(self, states: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(own_logits(self.model, states).float(), labels, reduction="none")


_ATTRIBUTE = "_fgpt_output_head"  # of a model whose head is known


def output_head(model: PreTrainedModel) -> OutputHead:
    """Return the head of a model, found by a probe with a few tokens.

    Raises:
        UserError: the head cannot be told from the network before it.

    Example:
        >>> from transformers import PhiConfig, PhiForCausalLM
        >>> shape = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
        >>> type(output_head(PhiForCausalLM(PhiConfig(**shape, num_attention_heads=2)))).__name__  # it has a bias
        'OwnHead'
    """
    head: OutputHead | None = getattr(model, _ATTRIBUTE, None)
    if head is None:
        head = ProductHead(model) if isinstance(model, FGPTForCausalLM) else _find_head(model)
        setattr(model, _ATTRIBUTE, head)
    return head


@torch.no_grad()
def _find_head(model: PreTrainedModel) -> OutputHead:
    ids = torch.arange(PROBE_TOKENS, device=model.device)[None] % len(token_embeddings(model))
    with evaluation_mode(model):
        logits = model(input_ids=ids, use_cache=False).logits[0].float()
        states = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0]
        weight = output_embeddings(model)
        if weight is not None and _is_all_of_head(model, weight) and weight.shape == (logits.shape[1], states.shape[1]):
            product = (states @ weight.T.to(states.dtype)).float()
            if _are_equal(softcapped(product, logit_softcap(model)), logits):
                return ProductHead(model)
        if _are_equal(_own_logits_or_none(model, states), logits):
            return OwnHead(model)
    raise UserError(
        f"the head of a {type(model).__name__} cannot be told from the network before it, so its loss would need all "
        "logits at once: choose another model"
    )


def _is_all_of_head(model: PreTrainedModel, weight: Tensor) -> bool:
    """Return whether a model has no other parameter after its network, such as a bias, which may still be zero."""
    before = {id(parameter) for parameter in model.get_decoder().parameters()}
    return all(id(parameter) in before or parameter is weight for parameter in model.parameters())


def _own_logits_or_none(model: PreTrainedModel, states: Tensor) -> Tensor:
    """Return the logits of a model's own code, or nothing where it wants more than final states."""
    if _own_part(model) is None:
        return states[:0]
    try:
        return own_logits(model, states).float()
    except (AttributeError, TypeError, ValueError, IndexError):
        return states[:0]


def _are_equal(logits: Tensor, expected: Tensor) -> bool:
    return logits.shape == expected.shape and bool((logits - expected).abs().max() <= TOLERANCE * expected.abs().max())


def own_logits(model: PreTrainedModel, states: Tensor) -> Tensor:
    """Return the logits, `(N, V)`, that a model's own code makes of final states, `(N, D)`."""
    name = _own_part(model)
    assert name is not None
    network = getattr(model, name)
    ids = torch.zeros(1, len(states), dtype=torch.int64, device=states.device)
    setattr(model, name, _GivenStates(states[None]))
    try:
        logits: Tensor = model(input_ids=ids, use_cache=False).logits[0]
    finally:
        setattr(model, name, network)
    return logits


class _GivenStates(nn.Module):
    """A network that returns given final states."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states

    def forward(self, *arguments: Any, **options: Any) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=self.states)


def _own_part(model: PreTrainedModel) -> str | None:
    """Return the name by which a model calls the network before its head, or None."""
    network = model.get_decoder()
    return next((name for name, child in model.named_children() if child is network), None)
