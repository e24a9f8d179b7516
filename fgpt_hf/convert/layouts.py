"""Translate the weights of other programs to FGPT's names, and back: pure functions of tensors by name.

Four layouts can be read. All name the network as GPT-2 does (`transformer.h.0.mlp.c_fc.weight`, …):

- `gpt2`: transformers' `GPT2LMHeadModel`, with linear weights stored as (in, out);
- `nanogpt`: karpathy/nanoGPT's `ckpt.pt`, stored as (out, in), with all biases or none, including the norms';
- `original-2026`: the original FGPT, stored as (out, in), without biases in its attention;
- `original-2025`: its first year, with `nn.MultiheadAttention` and a second output projection right after the first.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import GPT2Config

from fgpt_hf.errors import UserError, one_line
from fgpt_hf.model.configuration_fgpt import FGPTConfig
from fgpt_hf.model.modeling_fgpt import FGPTForCausalLM

ORIGINAL_HEADS = 24  # the weights do not show how many heads there are
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
EXACT_GELU = "gelu"  # used by nanoGPT and the original; GPT-2 itself has the tanh approximation

# GPT-2's names of modules, each with FGPT's.
MODEL_MODULES = {"wte": "embed_tokens", "wpe": "embed_positions", "ln_f": "norm"}
LAYER_MODULES = {
    "ln_1": "input_layernorm",
    "attn.c_proj": "self_attn.o_proj",
    "ln_2": "post_attention_layernorm",
    "mlp.c_fc": "mlp.up_proj",
    "mlp.c_proj": "mlp.down_proj",
}
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")  # stacked in attn.c_attn
LINEAR_MODULES = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")

# The weights of each layout, where N is any layer: with one matrix for queries, keys and values, or as in 2025.
_FUSED = {
    *(f"transformer.{name}" for name in ("wte.weight", "wpe.weight", "ln_f.weight")),
    *(f"transformer.h.N.{module}.weight" for module in ("ln_1", "ln_2", *LINEAR_MODULES)),
}
_TWICE_PROJECTED = _FUSED - {"transformer.h.N.attn.c_attn.weight"} | {
    "transformer.h.N.attn.attn.in_proj_weight",
    "transformer.h.N.attn.attn.out_proj.weight",
}


class ConvertedWeights(NamedTuple):
    """A network under FGPT's names, and the layout in which it was found."""

    layout: str
    config: FGPTConfig
    weights: dict[str, Tensor]


def from_checkpoint(checkpoint: Mapping[str, Any], num_attention_heads: int | None = None) -> ConvertedWeights:
    """Return the network in what `torch.load` gave: nanoGPT's layout or one of the original FGPT's, found by its keys.

    The weights may be at the top level, or under `model_state_dict` or `model`; their names may begin with `_orig_mod.`
    or `module.`.

    Args:
        num_attention_heads: by default, what nanoGPT recorded, or the original's 24.

    Raises:
        UserError: the layout is unknown, the weights do not fit together, or the heads do not divide the width.
    """
    state = _state_dict(checkpoint)
    layout = _layout(state, "nanogpt" if "model_args" in checkpoint else "original-2026")
    if layout == "original-2025":
        state = fold_output_projections(state)
    recorded = checkpoint.get("model_args")
    recorded_heads = recorded.get("n_head", ORIGINAL_HEADS) if isinstance(recorded, Mapping) else ORIGINAL_HEADS
    heads = num_attention_heads or recorded_heads
    weights = fgpt_names(state)
    shape = {"num_attention_heads": heads, "hidden_act": EXACT_GELU, "pad_token_id": None}
    return ConvertedWeights(layout, *_network(weights, shape))


def from_gpt2(config: GPT2Config, state: Mapping[str, Tensor]) -> ConvertedWeights:
    """Return the network of a `GPT2LMHeadModel` from its config and its weights.

    Raises:
        UserError: it has a feature that FGPT lacks; the message names the field.
    """
    for field, value in {
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    }.items():
        if getattr(config, field) != value:
            raise UserError(f"{field}={getattr(config, field)} is a feature that FGPT lacks: it needs {value}")
    linear = re.compile("|".join(re.escape(f".{module}.weight") for module in LINEAR_MODULES))
    state = {name: tensor.T if linear.search(name) else tensor for name, tensor in state.items()}
    shape = {name: getattr(config, name) for name in FGPTConfig.attribute_map if name != "n_inner"}
    tokens = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return ConvertedWeights("gpt2", *_network(fgpt_names(state), shape | tokens))


def to_gpt2_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return FGPT's weights as those of a `GPT2LMHeadModel`, whose linear weights are (in, out)."""
    return {
        name: tensor.T.contiguous() if name.endswith(".weight") and name[:-7].endswith(LINEAR_MODULES) else tensor
        for name, tensor in gpt2_names(state).items()
    }


def fgpt_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename GPT-2's weights to FGPT's names; linear weights are (out, in) on both sides.

    Example:
        >>> list(fgpt_names({"transformer.h.0.attn.c_attn.bias": torch.zeros(6)}))[0]
        'model.layers.0.self_attn.q_proj.bias'
    """
    weights: dict[str, Tensor] = {}
    for name, tensor in state.items():
        path, _, kind = name.removeprefix("transformer.").rpartition(".")
        layer = re.fullmatch(r"h\.(\d+)\.(.+)", path)
        if layer is None:
            weights[f"model.{MODEL_MODULES[path]}.{kind}" if path in MODEL_MODULES else name] = tensor
        elif layer[2] == "attn.c_attn":
            for module, third in zip(QKV, tensor.chunk(3), strict=False):
                weights[f"model.layers.{layer[1]}.{module}.{kind}"] = third.clone()  # safetensors wants no views
        else:
            weights[f"model.layers.{layer[1]}.{LAYER_MODULES[layer[2]]}.{kind}"] = tensor
    return {name: tensor.contiguous() for name, tensor in weights.items()}


def gpt2_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename FGPT's weights to GPT-2's names; linear weights are (out, in) on both sides.

    Example:
        >>> list(gpt2_names({"model.layers.0.mlp.up_proj.bias": torch.zeros(4)}))
        ['transformer.h.0.mlp.c_fc.bias']
    """
    modules = {ours: theirs for theirs, ours in (MODEL_MODULES | LAYER_MODULES).items()}
    state: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        path, _, kind = name.removeprefix("model.").rpartition(".")
        layer = re.fullmatch(r"layers\.(\d+)\.(.+)", path)
        if layer is None:
            state[f"transformer.{modules[path]}.{kind}" if path in modules else name] = tensor
        elif layer[2] == QKV[0]:
            thirds = [weights[f"model.layers.{layer[1]}.{module}.{kind}"] for module in QKV]
            state[f"transformer.h.{layer[1]}.attn.c_attn.{kind}"] = torch.cat(thirds)
        elif layer[2] not in QKV:
            state[f"transformer.h.{layer[1]}.{modules.get(layer[2], layer[2])}.{kind}"] = tensor
    return state


def pad_vocabulary(converted: ConvertedWeights, vocab_size: int) -> ConvertedWeights:
    """Return the same network with more tokens, each with the mean of all embeddings.

    The logit of such a token is the mean of the others', so it is never the most likely one.

    Raises:
        UserError: the network already has more tokens.
    """
    present = converted.config.vocab_size
    if vocab_size < present:
        raise UserError(f"vocab_size={vocab_size} is too small: the weights have {present} tokens")
    weights = dict(converted.weights)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        mean = weights[name].double().mean(dim=0, keepdim=True).to(weights[name].dtype)
        weights[name] = torch.cat([weights[name], mean.expand(vocab_size - present, -1)])
    config = FGPTConfig(**converted.config.to_dict() | {"vocab_size": vocab_size})
    return ConvertedWeights(converted.layout, config, weights)


def _state_dict(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the weights in a checkpoint, without the wrappers around them and the prefixes of their names."""
    state = checkpoint
    for key in ("model_state_dict", "model"):
        if isinstance(checkpoint.get(key), Mapping):
            state = checkpoint[key]
    bare = {re.sub(r"^((_orig_mod|module)\.)+", "", str(name)): value for name, value in state.items()}
    causal_mask = re.compile(r"\.attn\.(masked_)?bias$")  # older versions of GPT-2 and nanoGPT saved it
    return {name: value for name, value in bare.items() if not causal_mask.search(name)}


def _layout(state: Mapping[str, Any], fused_layout: str) -> str:
    """Return `original-2025`, or `fused_layout` if queries, keys and values are one matrix.

    Raises:
        UserError: it is neither.
    """
    patterns = [re.sub(r"\.h\.\d+\.", ".h.N.", name) for name in state]
    weights = {pattern for pattern in patterns if not re.search(r"[._]bias$", pattern)} - {"lm_head.weight"}
    layers = patterns.count("transformer.h.N.ln_1.weight")
    numbers = {int(number) for number in re.findall(r"\.h\.(\d+)\.", " ".join(state))}
    is_even = numbers == set(range(layers)) and all(
        patterns.count(pattern) == layers for pattern in patterns if ".h.N." in pattern
    )
    are_tensors = all(isinstance(value, Tensor) for value in state.values())
    for layout, expected in ((fused_layout, _FUSED), ("original-2025", _TWICE_PROJECTED)):
        if weights == expected and is_even and are_tensors:
            _require_plain_weights(state)
            return layout
    shown = ", ".join(sorted(set(patterns))[:40]) or "nothing"
    raise UserError(
        f"unknown layout: expected {', '.join(sorted(_FUSED))} for each layer N, or with attn.attn.in_proj_weight and "
        f"attn.attn.out_proj.weight in place of attn.c_attn.weight; found {shown}"
        + ("" if is_even else ", and not every one of them in every layer from 0 on")
    )


def _require_plain_weights(state: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are no floating-point numbers in memory, or have another rank than a weight of their name."""
    for name, tensor in state.items():
        if tensor.dtype not in DTYPES or tensor.layout is not torch.strided or tensor.is_meta:
            kind = f"{tensor.dtype}, {tensor.layout}{', without values' if tensor.is_meta else ''}"
            raise UserError(f"{name} should hold floating-point numbers ({kind}): save it with .to_dense().float()")
        is_matrix = name.endswith("weight") and ".ln_" not in name
        if tensor.dim() != (2 if is_matrix else 1):
            rank = "matrix" if is_matrix else "vector"
            raise UserError(f"the weights do not fit together: {name} should be a {rank}, not {tuple(tensor.shape)}")


def fold_output_projections(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Merge the two output projections of the 2025 layout: Wc (Wo x + bo) + bc = (Wc Wo) x + (Wc bo + bc)."""
    folded = {name: tensor for name, tensor in state.items() if ".attn." not in name}
    for name in [name for name in state if name.endswith(".attn.attn.in_proj_weight")]:
        attention = name.removesuffix("attn.in_proj_weight")
        first, second = f"{attention}attn.out_proj", f"{attention}c_proj"
        dtype = state[f"{second}.weight"].dtype
        outer, inner = state[f"{second}.weight"].double(), state[f"{first}.weight"].double()
        if outer.shape[1] != len(inner):
            raise UserError(f"the weights do not fit together: {first}.weight and {second}.weight cannot be multiplied")
        bias = outer @ _bias(state, first) + _bias(state, second)
        folded[f"{second}.weight"], folded[f"{second}.bias"] = (outer @ inner).to(dtype), bias.to(dtype)
        folded[f"{attention}c_attn.weight"] = state[name]
        if f"{attention}attn.in_proj_bias" in state:
            folded[f"{attention}c_attn.bias"] = state[f"{attention}attn.in_proj_bias"]
    return folded


def _bias(state: Mapping[str, Tensor], module: str) -> Tensor:
    """Return a linear module's bias as float64; zeros if it has none."""
    rows = len(state[f"{module}.weight"])
    bias = state.get(f"{module}.bias", torch.zeros(rows)).double()
    if len(bias) != rows:
        raise UserError(
            f"the weights do not fit together: {module}.bias should be {(rows,)} and is {tuple(bias.shape)}"
        )
    return bias


def _network(weights: dict[str, Tensor], options: Mapping[str, Any]) -> tuple[FGPTConfig, dict[str, Tensor]]:
    """Return the config that the names and the shapes of the weights imply, and the weights with all their biases.

    Biases that are missing although others of their kind are there are zeros.
    """
    embeddings = weights["model.embed_tokens.weight"]
    head = weights.setdefault("lm_head.weight", embeddings)
    shape = {
        "vocab_size": len(embeddings),
        "hidden_size": embeddings.shape[1],
        "max_position_embeddings": len(weights["model.embed_positions.weight"]),
        "intermediate_size": len(weights["model.layers.0.mlp.up_proj.weight"]),
        "num_hidden_layers": sum(name.endswith(".input_layernorm.weight") for name in weights),
        "attention_bias": "model.layers.0.self_attn.q_proj.bias" in weights,
        "mlp_bias": "model.layers.0.mlp.up_proj.bias" in weights,
        "tie_word_embeddings": torch.equal(head, embeddings),
    }
    try:
        config = FGPTConfig(**{**options, **shape})
        with torch.device("meta"):
            expected = FGPTForCausalLM(config).state_dict()
    except (ValueError, StrictDataclassError) as error:  # heads that do not divide the width; an unknown activation
        raise UserError(one_line(error)) from error
    for name, tensor in expected.items():
        if name.endswith(".bias"):
            weights.setdefault(name, torch.zeros(tensor.shape, dtype=embeddings.dtype))
    _require_same_shapes(expected, weights)
    return config, weights


def _require_same_shapes(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    for name in (*expected, *weights):
        ours, theirs = (tuple(state[name].shape) if name in state else "missing" for state in (expected, weights))
        if ours != theirs:
            raise UserError(f"the weights do not fit together: {name} should be {ours} and is {theirs}")
