"""Probe what a token of a causal language model sees: earlier tokens only, and in a packed row its own document only.

No attribute of a model says so, hence a probe with a few tokens.
"""

from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fgpt_hf.errors import UserError
from fgpt_hf.model.embeddings import token_embeddings
from fgpt_hf.model.evaluation_mode import evaluation_mode
from fgpt_hf.model.modeling_fgpt import FGPTForCausalLM

LENGTHS = (5, 7)  # of two documents
TOLERANCES = {torch.float32: 1e-4}  # relative to the norm of the states
LOW_TOLERANCE = 0.03  # of other types
TELLING = 0.1  # what packing may change, of what mixing does


@torch.no_grad()
def require_causal(name: str, model: PreTrainedModel) -> None:
    """Raise UserError if a token's state depends on later tokens, as in an encoder.

    Args:
        name: the model's, for the message.
    """
    first, second = _documents(model)
    changed = torch.cat([first[:, :-1], second[:, :1]], dim=1)
    if not _are_close(_states(model, first)[:, :-1], _states(model, changed)[:, :-1]):
        raise UserError(
            f"{name} holds a {type(model).__name__}, in which a token sees those after it, as in an encoder: choose a "
            "causal language model, such as a GPT-2 or a Llama"
        )


@torch.no_grad()
def keeps_documents_apart(model: PreTrainedModel) -> bool:
    """Return whether restarting positions keep the documents of a row apart, as if each were alone.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> keeps_documents_apart(GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=8, n_layer=1, n_head=2)))
        True
    """
    if isinstance(model, FGPTForCausalLM):
        return True
    if "position_ids" not in signature(model.forward).parameters:
        return False
    first, second = _documents(model)
    positions = torch.cat([torch.arange(length, device=model.device) for length in LENGTHS])[None]
    row, alone = torch.cat([first, second], dim=1), _states(model, second)
    try:
        packed = _states(model, row, position_ids=positions)[:, LENGTHS[0] :]
        mixed = _states(model, row, position_ids=positions, attention_mask=torch.ones_like(row))[:, LENGTHS[0] :]
    except (TypeError, ValueError, IndexError, RuntimeError):  # a model that takes no such positions
        return False
    # Where mixing changes nothing either, as in a network whose attention is still zero, the probe tells nothing.
    is_told = (packed - alone).norm() <= TELLING * (mixed - alone).norm()
    return _are_close(packed, alone) and bool(is_told)


def _documents(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Return the ids, `(1, T)`, of two documents."""
    ids = 1 + torch.arange(sum(LENGTHS), device=model.device) * 7 % (len(token_embeddings(model)) - 1)
    first, second = ids[None].split(LENGTHS, dim=1)
    return first, second


def _states(model: PreTrainedModel, ids: Tensor, **inputs: Tensor) -> Tensor:
    """Return the final states, `(1, T, D)`, as training computes them but for dropout."""
    network: Any = model.get_decoder()
    with evaluation_mode(model):
        states: Tensor = network(input_ids=ids, use_cache=False, **inputs).last_hidden_state
    return states


def _are_close(states: Tensor, expected: Tensor) -> bool:
    tolerance = TOLERANCES.get(states.dtype, LOW_TOLERANCE)
    return bool((states - expected).norm() <= tolerance * expected.norm())
