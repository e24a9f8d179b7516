"""The shape of any causal language model, from a network without memory."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fgpt_hf.model.configuration_fgpt import FGPTConfig

# All that makes two configurations two networks: not dropout, the cache and the tokens that end a text.
NETWORK_FIELDS = tuple(
    name
    for name in vars(FGPTConfig)["__annotations__"]
    if not name.endswith(("_dropout", "_token_id")) and name != "use_cache"
)
MATRIX, TOKEN_EMBEDDINGS, OUTPUT_HEAD, POSITION_EMBEDDINGS, VECTOR = (
    *("matrices", "token_embeddings", "output_head"),
    *("position_embeddings", "vectors"),
)
REMOTE_CODE = "transformers_modules"  # the package of code that came with a model, which somebody has trusted


@dataclass(frozen=True)
class NetworkShape:
    """What memory and arithmetic follow from, under FGPT's names.

    Attributes:
        parameters: the shape of each parameter by its name; a tied head is left out.
        kinds: what each of them is: one of the names of `runtime.network.ParameterCounts`.
        linear_layers: the inputs and outputs of each linear layer within the layers, by its name.
        token_matrices: the modules with a row for each token, by the last part of their names: embeddings, and a head
            that is not tied to them.
        mlp: "plain" or "gated".
        norm: "layernorm" or "rmsnorm".
        max_position_embeddings: 0 if the configuration names none.
        is_exact: whether the names stand for all that the network does, as in FGPT's own.
    """

    model_type: str
    parameters: Mapping[str, torch.Size]
    kinds: Mapping[str, str]
    linear_layers: Mapping[str, tuple[int, int]]
    token_matrices: tuple[str, ...]
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    mlp: str
    norm: str
    norm_elementwise_affine: bool
    qk_norm: bool
    is_exact: bool

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        """The number of parameters by kind."""
        counts: Counter[str] = Counter()
        for name, shape in self.parameters.items():
            counts[self.kinds[name]] += shape.numel()
        return counts


def shape_of(network: PreTrainedConfig | NetworkShape) -> NetworkShape:
    """Return the shape of the network that a configuration describes.

    Example:
        >>> shape = shape_of(FGPTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
        >>> shape.parameters["model.layers.0.mlp.up_proj.weight"], shape.linear_layers["model.layers.0.mlp.up_proj"]
        (torch.Size([32, 8]), (8, 32))
        >>> sum(shape.numel() for shape in shape_of(FGPTConfig()).parameters.values())
        712035360
    """
    if isinstance(network, NetworkShape):
        return network
    key = type(network), network.to_json_string()
    if key not in _SHAPES:
        _SHAPES[key] = _read_shape(network)
    return _SHAPES[key]


_SHAPES: dict[tuple[type, str], NetworkShape] = {}


def network_without_memory(config: PreTrainedConfig) -> PreTrainedModel:
    """Return the model that a configuration describes, on the meta device."""
    is_remote = type(config).__module__.partition(".")[0] == REMOTE_CODE
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=is_remote)
    return model


def _read_shape(config: PreTrainedConfig) -> NetworkShape:
    model, text = network_without_memory(config), config.get_text_config()
    parameters = {name: parameter.shape for name, parameter in model.named_parameters()}
    heads = _number(text, "num_attention_heads")
    width = _number(text, "hidden_size")
    norms = [name for name in parameters if "norm" in name or ".ln_" in name]
    names = " ".join(parameters)
    is_own = isinstance(config, FGPTConfig)
    return NetworkShape(
        model_type=config.model_type,
        parameters=parameters,
        kinds=_kinds(model, parameters),
        linear_layers=_linear_layers(model),
        token_matrices=_token_matrices(model, parameters),
        hidden_size=width,
        num_hidden_layers=_number(text, "num_hidden_layers"),
        num_attention_heads=heads,
        head_dim=_number(text, "head_dim") or width // max(1, heads),
        intermediate_size=_number(text, "intermediate_size", "n_inner", "ffn_dim") or 4 * width,
        vocab_size=_number(text, "vocab_size"),
        max_position_embeddings=_number(text, "max_position_embeddings"),
        mlp=config.mlp if is_own else "gated" if "gate" in names else "plain",
        norm=config.norm if is_own else "layernorm" if any(name.endswith("bias") for name in norms) else "rmsnorm",
        norm_elementwise_affine=bool(config.norm_elementwise_affine if is_own else norms),
        qk_norm=bool(config.qk_norm if is_own else "q_norm" in names),
        is_exact=is_own,
    )


def _kinds(model: PreTrainedModel, parameters: Mapping[str, torch.Size]) -> dict[str, str]:
    """Return what each parameter is."""
    kinds = {name: MATRIX if len(shape) > 1 else VECTOR for name, shape in parameters.items()}
    for name, module in model.named_modules():
        weight = f"{name}.weight"
        if weight in kinds and isinstance(module, nn.Embedding):
            is_tokens = module is model.get_input_embeddings()
            kinds[weight] = TOKEN_EMBEDDINGS if is_tokens else POSITION_EMBEDDINGS
        elif weight in kinds and module is model.get_output_embeddings():
            kinds[weight] = OUTPUT_HEAD
    return kinds


def _linear_layers(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    found = {}
    for name, module in model.named_modules():
        if module is model.get_output_embeddings():
            continue
        if isinstance(module, nn.Linear):
            found[name] = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            found[name] = (module.nx, module.nf)
    return found


def _token_matrices(model: PreTrainedModel, parameters: Mapping[str, torch.Size]) -> tuple[str, ...]:
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    names = [name for end in ends for name, module in model.named_modules() if module is end]
    return tuple(name.rpartition(".")[2] for name in names if f"{name}.weight" in parameters)


def _number(config: Any, *names: str) -> int:
    """Return the first of several fields of a configuration that holds a number, or 0."""
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if isinstance(value, int)), 0)
