"""Express FGPT networks as classes that everybody's transformers has, and read those classes back.

Each entry of `STOCK_CLASSES` says for which values of FGPT's switches a class computes the same. A switch that an entry
does not mention must have its default, so a block that is new in FGPT is refused by its field until an entry knows it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from inspect import get_annotations
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import (
    ArceeForCausalLM,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    NanoChatForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3ForCausalLM,
)
from transformers.initialization import no_init_weights

from fgpt_hf.convert.layouts import ConvertedWeights, to_gpt2_state
from fgpt_hf.errors import UserError, one_line
from fgpt_hf.model.configuration_fgpt import FGPTConfig
from fgpt_hf.model.modeling_fgpt import FGPTForCausalLM

AUTO = "auto"  # the first class that computes the same
# Fields that every class has, under its own names.
CARRIED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("max_position_embeddings", "layer_norm_eps", "initializer_range", "attention_dropout", "use_cache"),
    *("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"),
)
# Fields that change no logit of a trained model, or that follow from others.
WITHOUT_EFFECT = ("zero_init_residual", "embedding_dropout", "residual_dropout", "norm_bias", "rope_parameters")
FLOATS = ("layer_norm_eps", "initializer_range", "final_logit_softcapping")  # other classes refuse integers
UNREAD = {"max_window_layers", "pretraining_tp"}  # fields of Qwen3 and Llama that change nothing by themselves
PROBE_TOKENS = (2, 16)  # rows and tokens on which an exported network must agree with its source
TOLERANCES = {torch.float64: 1e-7, torch.float32: 1e-4}  # of the largest logit; reduced precision is only compared
REDUCED_PRECISION_TOLERANCE = 0.1

_ROTARY = {"position_embedding": "rope", "norm": "rmsnorm"}
_ROTARY_COPIED = ("hidden_act", "num_key_value_heads", "head_dim", "attention_bias", "rope_parameters")
_RMS = {"layer_norm_eps": "rms_norm_eps"}


@dataclass(frozen=True, kw_only=True)
class StockClass:
    """A class of transformers, and the FGPT networks that it can express.

    Attributes:
        title: what people call the architecture.
        network: the class.
        needs: switches of FGPT with the one value that the class has built in.
        copied: switches that the class has too, or fields beyond `CARRIED`.
        filled: switches whose missing weights can be ones, or zeros for biases.
        fields: the class's names of fields, by FGPT's.
        modules: the class's names of modules within a layer, by FGPT's.
        rotates_backwards: whether its rotary positions rotate the other way, which exchanges the halves of each head.
    """

    title: str
    network: type[PreTrainedModel]
    needs: Mapping[str, object] = field(default_factory=dict)
    copied: tuple[str, ...]
    filled: tuple[str, ...] = ()
    fields: Mapping[str, str] = field(default_factory=dict)
    modules: Mapping[str, str] = field(default_factory=dict)
    rotates_backwards: bool = False


STOCK_CLASSES: Mapping[str, StockClass] = {
    "gpt2": StockClass(
        title="GPT-2",
        network=GPT2LMHeadModel,
        copied=("hidden_act", "embedding_dropout", "residual_dropout"),
        filled=("attention_bias", "mlp_bias"),
        fields={ours: theirs for theirs, ours in FGPTConfig.attribute_map.items()},
    ),
    "llama": StockClass(
        title="Llama",
        network=LlamaForCausalLM,
        needs={**_ROTARY, "mlp": "gated"},
        copied=(*_ROTARY_COPIED, "mlp_bias"),
        filled=("norm_elementwise_affine",),
        fields=_RMS,
    ),
    "qwen3": StockClass(
        title="Qwen3",
        network=Qwen3ForCausalLM,
        needs={**_ROTARY, "mlp": "gated", "qk_norm": True, "mlp_bias": False},
        copied=_ROTARY_COPIED,
        filled=("norm_elementwise_affine",),
        fields=_RMS,
    ),
    "arcee": StockClass(
        title="Arcee",
        network=ArceeForCausalLM,
        needs=_ROTARY,
        copied=(*_ROTARY_COPIED, "mlp_bias"),
        filled=("norm_elementwise_affine",),
        fields=_RMS,
    ),
    "nanochat": StockClass(
        title="nanochat",
        network=NanoChatForCausalLM,
        # It normalizes queries and keys after rotating them: without weights, that is the same.
        needs={**_ROTARY, "norm_elementwise_affine": False, "embedding_norm": True, "qk_norm": True, "mlp_bias": False},
        copied=(*_ROTARY_COPIED, "final_logit_softcapping"),
        fields=_RMS,
        modules={"mlp.up_proj": "mlp.fc1", "mlp.down_proj": "mlp.fc2"},
        rotates_backwards=True,
    ),
}


def to_stock(model: FGPTForCausalLM, name: str = AUTO) -> PreTrainedModel:
    """Return the same network as a class of transformers, which needs no remote code.

    Args:
        name: one of `STOCK_CLASSES`, or "auto" for the first one that computes the same.

    Raises:
        UserError: the class, or with "auto" each class, lacks something that the network has; the message names its
            fields, or its weights. Or the network's code was changed, so that the class computes something else.

    Example:
        >>> blocks = {"position_embedding": "rope", "norm": "rmsnorm", "mlp": "gated", "hidden_act": "silu"}
        >>> config = FGPTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, mlp_bias=False, **blocks)
        >>> model = FGPTForCausalLM(config).eval()
        >>> stock = to_stock(model)
        >>> ids = torch.tensor([[5, 6, 7]])
        >>> type(stock).__name__, torch.allclose(stock(ids).logits, model(ids).logits, atol=1e-5)
        ('LlamaForCausalLM', True)
    """
    name = fitting_class(model.config) if name == AUTO else name
    stock = STOCK_CLASSES[name]
    if lacking := misfits(model.config, name):
        raise UserError(_refusal(stock, model.config, lacking))
    config = _stock_config(stock, model.config, dtype=model.dtype)
    network = network_with(stock.network, config, _stock_weights(model, stock))
    network.generation_config = model.generation_config
    _require_same_logits(model, network)
    return network


def network_with(kind: type[PreTrainedModel], config: PreTrainedConfig, weights: dict[str, Tensor]) -> PreTrainedModel:
    """Return a network of a class with these very tensors, in evaluation mode.

    Biases that are missing become zeros, and missing weights of normalizations ones.

    Raises:
        UserError: weights are missing, have another shape, or are unknown to the class.
    """
    with no_init_weights():  # not on the meta device, where rotary positions would have no frequencies
        network = kind(config)
    network.load_state_dict(_completed(weights, network), assign=True)
    network.tie_weights()
    network.eval()
    return network


def fitting_class(config: FGPTConfig) -> str:
    """Return the name of the first stock class that computes the same as a network of this configuration.

    Raises:
        UserError: none does; the message names the fields that keep the nearest one from it.

    Example:
        >>> fitting_class(FGPTConfig())
        'gpt2'
    """
    lacking = {name: misfits(config, name) for name in STOCK_CLASSES}
    nearest = min(lacking, key=lambda name: len(lacking[name]))
    if lacking[nearest]:
        reason = _refusal(STOCK_CLASSES[nearest], config, lacking[nearest])
        raise UserError(f"no stock class of transformers computes this network; the nearest, {reason}")
    return nearest


def misfits(config: FGPTConfig, name: str) -> dict[str, object]:
    """Return the fields that keep a stock class from computing the same, each with the value that the class needs.

    Example:
        >>> misfits(FGPTConfig(position_embedding="rope"), "gpt2")
        {'position_embedding': 'learned'}
    """
    stock = STOCK_CLASSES[name]
    free = {*CARRIED, *WITHOUT_EFFECT, *stock.copied, *stock.filled}
    needs = {name: getattr(FGPTConfig, name) for name in get_annotations(FGPTConfig) if hasattr(FGPTConfig, name)}
    needs["num_key_value_heads"] = config.num_attention_heads
    needs["head_dim"] = config.hidden_size // config.num_attention_heads
    needs |= stock.needs
    return {name: value for name, value in needs.items() if name not in free and getattr(config, name) != value}


def from_stock(config: PreTrainedConfig, state: Mapping[str, Tensor]) -> ConvertedWeights:
    """Return the network of a stock class with rotary positions from its config and its weights.

    Raises:
        UserError: it has a feature that FGPT lacks; the message names the field.
    """
    stock = STOCK_CLASSES[config.model_type]
    names = [name for name in (*CARRIED, *stock.copied) if hasattr(config, stock.fields.get(name, name))]
    values = {name: getattr(config, stock.fields.get(name, name)) for name in names}
    try:
        ours = FGPTConfig(**values | dict(stock.needs))
        again = _stock_config(stock, ours)
    except (ValueError, StrictDataclassError) as error:
        raise UserError(one_line(error)) from error
    for name in sorted(get_annotations(type(config)).keys() - UNREAD):
        found, needed = getattr(config, name), getattr(again, name)
        if found != needed:
            raise UserError(f"{name}={found!r} is a feature that FGPT lacks: it needs {needed!r}")
    modules = {theirs: ours for ours, theirs in stock.modules.items()}
    weights = _renamed(state, modules)
    return ConvertedWeights(config.model_type, ours, _turned(weights, ours) if stock.rotates_backwards else weights)


def _refusal(stock: StockClass, config: FGPTConfig, lacking: Mapping[str, object]) -> str:
    named = (f"{name}={getattr(config, name)!r} (it needs {value!r})" for name, value in lacking.items())
    return f"{stock.network.__name__} lacks {', '.join(named)}"


def _stock_config(stock: StockClass, config: FGPTConfig, **options: Any) -> PreTrainedConfig:
    values = {name: getattr(config, name) for name in (*CARRIED, *stock.copied)}
    values |= {name: float(values[name]) for name in FLOATS if values.get(name) is not None}
    kind = stock.network.config_class
    assert kind is not None  # each class of transformers has one
    try:
        return kind(**{stock.fields.get(name, name): value for name, value in values.items()}, **options)
    except (ValueError, StrictDataclassError) as error:  # such as Llama's heads, which must divide its width
        raise UserError(f"{stock.network.__name__} refuses this network: {one_line(error)}") from error


def _stock_weights(model: FGPTForCausalLM, stock: StockClass) -> dict[str, Tensor]:
    state = model.state_dict()
    if stock.network is GPT2LMHeadModel:
        return to_gpt2_state(state)
    return _renamed(_turned(state, model.config) if stock.rotates_backwards else state, stock.modules)


def _renamed(state: Mapping[str, Tensor], modules: Mapping[str, str]) -> dict[str, Tensor]:
    def rename(name: str) -> str:
        module = next((module for module in modules if f".{module}." in name), None)
        return name if module is None else name.replace(f".{module}.", f".{modules[module]}.")

    return {rename(name): tensor for name, tensor in state.items()}


def _turned(state: Mapping[str, Tensor], config: FGPTConfig) -> dict[str, Tensor]:
    """Exchange the halves of each head of queries and keys, so that their pairs rotate the other way."""
    return {
        name: tensor.unflatten(0, (-1, 2, int(config.head_dim or 0) // 2)).flip(1).flatten(0, 2)
        if ".q_proj." in name or ".k_proj." in name
        else tensor
        for name, tensor in state.items()
    }


def _completed(state: dict[str, Tensor], network: PreTrainedModel) -> dict[str, Tensor]:
    """Add the weights that a stock class always has: zeros as biases, ones as weights of normalizations."""
    expected, dtype = network.state_dict(), next(iter(state.values())).dtype
    if unknown := sorted(state.keys() - expected.keys()):
        raise UserError(
            f"{type(network).__name__} lacks {len(unknown)} of this network's weights, such as {unknown[0]}"
        )
    for name, weight in expected.items():
        if name not in state and weight.dim() == 1:
            state[name] = (torch.zeros if name.endswith(".bias") else torch.ones)(weight.shape, dtype=dtype)
        elif name not in state or state[name].shape != weight.shape:
            found = tuple(state[name].shape) if name in state else "missing"
            raise UserError(f"{type(network).__name__} needs {name} of shape {tuple(weight.shape)}: it is {found}")
    return state


@torch.no_grad()
def _require_same_logits(model: FGPTForCausalLM, network: PreTrainedModel) -> None:
    """Compare two networks on a few tokens, because the code of a block can be changed without a switch for it.

    Raises:
        UserError: they disagree.
    """
    rows, tokens = PROBE_TOKENS
    tokens = min(tokens, model.config.max_position_embeddings)
    ids = (torch.arange(rows * tokens) * 7919 % model.config.vocab_size).view(rows, tokens)
    ours, theirs = (each(ids).logits.double() for each in (model, network))
    tolerance = TOLERANCES.get(model.dtype, REDUCED_PRECISION_TOLERANCE)
    difference, largest = float((ours - theirs).abs().max()), float(ours.abs().max())
    if not difference <= tolerance * max(1.0, largest):
        raise UserError(
            f"{type(network).__name__} does not compute the same as this network: logits differ by {difference:.2g}. "
            "The code of fgpt_hf/model/blocks_fgpt.py was changed without an option that says so"
        )
