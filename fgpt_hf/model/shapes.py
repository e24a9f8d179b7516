"""Names and shapes of a network's parameters, from a network without memory."""

import json
from collections.abc import Mapping
from functools import lru_cache

import torch

from fgpt_hf.model.configuration_fgpt import FGPTConfig
from fgpt_hf.model.modeling_fgpt import FGPTForCausalLM

# All that makes two configurations two networks: not dropout, the cache and the tokens that end a text.
NETWORK_FIELDS = tuple(
    name
    for name in vars(FGPTConfig)["__annotations__"]
    if not name.endswith(("_dropout", "_token_id")) and name != "use_cache"
)


def parameter_shapes(config: FGPTConfig) -> Mapping[str, torch.Size]:
    """Return the shape of each parameter by its name; a tied head is left out.

    Example:
        >>> shapes = parameter_shapes(FGPTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
        >>> shapes["model.layers.0.mlp.up_proj.weight"]
        torch.Size([32, 8])
        >>> sum(shape.numel() for shape in parameter_shapes(FGPTConfig()).values())
        712035360
    """
    return _parameter_shapes(config.to_json_string())


def linear_layers(config: FGPTConfig) -> dict[str, tuple[int, int]]:
    """Return the inputs and outputs of each linear layer by its name, without the head."""
    weights = {name.removesuffix(".weight"): shape for name, shape in parameter_shapes(config).items()}
    return {name: (shape[1], shape[0]) for name, shape in weights.items() if ".layers." in name and len(shape) == 2}


@lru_cache(maxsize=64)
def _parameter_shapes(config: str) -> Mapping[str, torch.Size]:
    with torch.device("meta"):
        model = FGPTForCausalLM(FGPTConfig.from_dict(json.loads(config)))
    return {name: parameter.shape for name, parameter in model.named_parameters()}
