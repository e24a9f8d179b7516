"""Names and shapes of a network's parameters, from a network without memory."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch

from fgpt_hf.model.configuration_fgpt import SIZES, FGPTConfig
from fgpt_hf.model.modeling_fgpt import FGPTForCausalLM

FIELDS = (*SIZES, "attention_bias", "mlp_bias", "tie_word_embeddings")


def parameter_shapes(config: FGPTConfig) -> Mapping[str, torch.Size]:
    """Return the shape of each parameter by its name; a tied head is left out.

    Example:
        >>> shapes = parameter_shapes(FGPTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
        >>> shapes["model.layers.0.mlp.up_proj.weight"]
        torch.Size([32, 8])
        >>> sum(shape.numel() for shape in parameter_shapes(FGPTConfig()).values())
        712035360
    """
    return _parameter_shapes(tuple((name, getattr(config, name)) for name in FIELDS))


def linear_layers(config: FGPTConfig) -> dict[str, tuple[int, int]]:
    """Return the inputs and outputs of each linear layer by its name, without the head."""
    weights = {name.removesuffix(".weight"): shape for name, shape in parameter_shapes(config).items()}
    return {name: (shape[1], shape[0]) for name, shape in weights.items() if ".layers." in name and len(shape) == 2}


@lru_cache(maxsize=64)
def _parameter_shapes(fields: tuple[tuple[str, Any], ...]) -> Mapping[str, torch.Size]:
    with torch.device("meta"):
        model = FGPTForCausalLM(FGPTConfig(**dict(fields)))
    return {name: parameter.shape for name, parameter in model.named_parameters()}
