"""Weights of other programs under FGPT's names, and back: pure functions of tensors by name.

Four layouts come in. All name the network as GPT-2 does (`transformer.h.0.mlp.c_fc.weight`, …):

- `gpt2`: transformers' `GPT2LMHeadModel`, whose linear weights are stored in × out;
- `nanogpt`: karpathy/nanoGPT's `ckpt.pt`, out × in, with all biases or none, the norms' included;
- `original-2026`: the original FGPT, out × in, without biases in its attention;
- `original-2025`: its first year, with `nn.MultiheadAttention` and a second output projection right after the first.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GPT2Config

from fgpt_hf.errors import UserError
from fgpt_hf.model.configuration_fgpt import FGPTConfig
from fgpt_hf.model.modeling_fgpt import FGPTForCausalLM

ORIGINAL_HEADS = 24  # not to be seen in the weights
EXACT_GELU = "gelu"  # of nanoGPT and the original; GPT-2's own is the tanh approximation

OF_MODEL = {"wte": "embed_tokens", "wpe": "embed_positions", "ln_f": "norm"}
OF_LAYER = {
    "ln_1": "input_layernorm",
    "attn.c_proj": "self_attn.o_proj",
    "ln_2": "post_attention_layernorm",
    "mlp.c_fc": "mlp.up_proj",
    "mlp.c_proj": "mlp.down_proj",
}
THIRDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")  # stacked in attn.c_attn
LINEAR = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")

_OUTSIDE = ("wte.weight", "wpe.weight", "ln_f.weight")
_FUSED = {
    *(f"transformer.{name}" for name in _OUTSIDE),
    *(f"transformer.h.N.{module}.weight" for module in ("ln_1", "ln_2", *LINEAR)),
}
_TWICE_PROJECTED = _FUSED - {"transformer.h.N.attn.c_attn.weight"} | {
    "transformer.h.N.attn.attn.in_proj_weight",
    "transformer.h.N.attn.attn.out_proj.weight",
}


class ConvertedWeights(NamedTuple):
    """What a checkpoint turned out to be: its layout, and its network as FGPT has it."""

    layout: str
    config: FGPTConfig
    weights: dict[str, Tensor]


def from_checkpoint(checkpoint: Mapping[str, Any], num_attention_heads: int | None = None) -> ConvertedWeights:
    """The network in what `torch.load` gave: the original FGPT's layouts and nanoGPT's, told apart by their keys.

    The weights may be bare, or under `model_state_dict` or `model`; their names may begin with `_orig_mod.` or
    `module.`. The number of heads is nanoGPT's own record, or the original's 24, where it is not given.

    Raises:
        UserError: another layout; heads that do not divide the width.
    """
    state = _state_dict(checkpoint)
    layout = _layout(state, "nanogpt" if "model_args" in checkpoint else "original-2026")
    if layout == "original-2025":
        state = fold_output_projections(state)
    heads = num_attention_heads or checkpoint.get("model_args", {}).get("n_head", ORIGINAL_HEADS)
    weights = fgpt_names(state)
    shape = {"num_attention_heads": heads, "hidden_act": EXACT_GELU}
    return ConvertedWeights(layout, *_network(weights, shape))


def from_gpt2(config: GPT2Config, state: Mapping[str, Tensor]) -> ConvertedWeights:
    """The network of a `GPT2LMHeadModel`.

    Raises:
        UserError: it has something that FGPT lacks; the message names the field.
    """
    for field, value in {
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    }.items():
        if getattr(config, field) != value:
            raise UserError(f"{field}={getattr(config, field)} is an architecture that FGPT lacks: it needs {value}")
    linear = re.compile("|".join(re.escape(f".{module}.weight") for module in LINEAR))
    state = {name: tensor.T if linear.search(name) else tensor for name, tensor in state.items()}
    shape = {name: getattr(config, name) for name in FGPTConfig.attribute_map if name != "n_inner"}
    tokens = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id")}
    return ConvertedWeights("gpt2", *_network(fgpt_names(state), shape | tokens))


def to_gpt2(model: FGPTForCausalLM) -> tuple[GPT2Config, dict[str, Tensor]]:
    """The same network as a `GPT2LMHeadModel`'s config and weights; biases that the model lacks are zero."""
    config = model.config
    shape = {name: getattr(config, name) for name in FGPTConfig.attribute_map}
    same = ("vocab_size", "initializer_range", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    gpt2 = GPT2Config(**shape, **{name: getattr(config, name) for name in same}, dtype=model.dtype)
    state = {
        name: tensor.T.contiguous() if name.endswith(".weight") and name[:-7].endswith(LINEAR) else tensor
        for name, tensor in gpt2_names(model.state_dict()).items()
    }
    for name in [name for name in state if name.endswith(tuple(f"{module}.weight" for module in LINEAR))]:
        state.setdefault(name.removesuffix("weight") + "bias", torch.zeros(state[name].shape[1], dtype=model.dtype))
    return gpt2, state


def fgpt_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """GPT-2's names to FGPT's, the linear weights being out × in on both sides."""
    weights: dict[str, Tensor] = {}
    for name, tensor in state.items():
        path, _, kind = name.removeprefix("transformer.").rpartition(".")
        layer = re.fullmatch(r"h\.(\d+)\.(.+)", path)
        if layer is None:
            weights[f"model.{OF_MODEL[path]}.{kind}" if path in OF_MODEL else name] = tensor
        elif layer[2] == "attn.c_attn":
            for module, third in zip(THIRDS, tensor.chunk(3), strict=False):
                weights[f"model.layers.{layer[1]}.{module}.{kind}"] = third.clone()  # safetensors wants no views
        else:
            weights[f"model.layers.{layer[1]}.{OF_LAYER[layer[2]]}.{kind}"] = tensor
    return {name: tensor.contiguous() for name, tensor in weights.items()}


def gpt2_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """FGPT's names to GPT-2's, the linear weights being out × in on both sides."""
    modules = {ours: theirs for theirs, ours in (OF_MODEL | OF_LAYER).items()}
    state: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        path, _, kind = name.removeprefix("model.").rpartition(".")
        layer = re.fullmatch(r"layers\.(\d+)\.(.+)", path)
        if layer is None:
            state[f"transformer.{modules[path]}.{kind}" if path in modules else name] = tensor
        elif layer[2] == THIRDS[0]:
            thirds = [weights[f"model.layers.{layer[1]}.{module}.{kind}"] for module in THIRDS]
            state[f"transformer.h.{layer[1]}.attn.c_attn.{kind}"] = torch.cat(thirds)
        elif layer[2] not in THIRDS:
            state[f"transformer.h.{layer[1]}.{modules[layer[2]]}.{kind}"] = tensor
    return state


def pad_vocabulary(found: ConvertedWeights, vocab_size: int) -> ConvertedWeights:
    """The same network with more tokens, each with the mean of all embeddings.

    The logit of such a token is the mean of the others', so it is never the likeliest.

    Raises:
        UserError: the network has more tokens already.
    """
    have = found.config.vocab_size
    if vocab_size < have:
        raise UserError(f"vocab_size={vocab_size} is too small: the weights have {have} tokens")
    weights = dict(found.weights)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        mean = weights[name].double().mean(dim=0, keepdim=True).to(weights[name].dtype)
        weights[name] = torch.cat([weights[name], mean.expand(vocab_size - have, -1)])
    config = FGPTConfig(**found.config.to_dict() | {"vocab_size": vocab_size})
    return ConvertedWeights(found.layout, config, weights)


def _state_dict(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights in a checkpoint without what other programs put around and in front of them."""
    state = checkpoint
    for key in ("model_state_dict", "model"):
        if isinstance(checkpoint.get(key), Mapping):
            state = checkpoint[key]
    bare = {re.sub(r"^((_orig_mod|module)\.)+", "", str(name)): value for name, value in state.items()}
    causal_mask = re.compile(r"\.attn\.(masked_)?bias$")  # a buffer of older versions
    return {name: value for name, value in bare.items() if not causal_mask.search(name)}


def _layout(state: Mapping[str, Any], fused: str) -> str:
    """`original-2025` or, where queries, keys and values are one matrix, the name that was given for that."""
    patterns = [re.sub(r"\.h\.\d+\.", ".h.N.", name) for name in state]
    found = {pattern for pattern in patterns if not re.search(r"[._]bias$", pattern)} - {"lm_head.weight"}
    layers = patterns.count("transformer.h.N.ln_1.weight")
    even = all(patterns.count(pattern) == layers for pattern in patterns if ".h.N." in pattern)
    tensors = all(isinstance(value, Tensor) for value in state.values())
    for name, expected in ((fused, _FUSED), ("original-2025", _TWICE_PROJECTED)):
        if found == expected and even and tensors:
            return name
    shown = ", ".join(sorted(set(patterns))[:40]) or "nothing"
    raise UserError(
        f"unknown layout: expected {', '.join(sorted(_FUSED))} for each layer N, or with attn.attn.in_proj_weight and "
        f"attn.attn.out_proj.weight in place of attn.c_attn.weight; found {shown}"
        + ("" if even else ", and not every one of them in every layer")
    )


def fold_output_projections(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The 2025 layout with one output projection in place of two: Wc (Wo x + bo) + bc = (Wc Wo) x + (Wc bo + bc)."""
    folded = {name: tensor for name, tensor in state.items() if ".attn." not in name}
    for name in [name for name in state if name.endswith(".attn.attn.in_proj_weight")]:
        attention = name.removesuffix("attn.in_proj_weight")
        first, second = f"{attention}attn.out_proj", f"{attention}c_proj"
        kind = state[f"{second}.weight"].dtype
        outer, inner = state[f"{second}.weight"].double(), state[f"{first}.weight"].double()
        zero = torch.zeros(len(outer), dtype=torch.float64)
        bias = outer @ state.get(f"{first}.bias", zero).double() + state.get(f"{second}.bias", zero).double()
        folded[f"{second}.weight"], folded[f"{second}.bias"] = (outer @ inner).to(kind), bias.to(kind)
        folded[f"{attention}c_attn.weight"] = state[name]
        if f"{attention}attn.in_proj_bias" in state:
            folded[f"{attention}c_attn.bias"] = state[f"{attention}attn.in_proj_bias"]
    return folded


def _network(weights: dict[str, Tensor], shape: Mapping[str, Any]) -> tuple[FGPTConfig, dict[str, Tensor]]:
    """The config that the weights' shapes and names tell, and the weights with zeros for biases that stand alone."""
    embeddings = weights["model.embed_tokens.weight"]
    head = weights.setdefault("lm_head.weight", embeddings)
    config = FGPTConfig(
        **{
            **shape,
            "vocab_size": len(embeddings),
            "hidden_size": embeddings.shape[1],
            "max_position_embeddings": len(weights["model.embed_positions.weight"]),
            "intermediate_size": len(weights["model.layers.0.mlp.up_proj.weight"]),
            "num_hidden_layers": sum(name.endswith(".input_layernorm.weight") for name in weights),
            "attention_bias": "model.layers.0.self_attn.q_proj.bias" in weights,
            "mlp_bias": "model.layers.0.mlp.up_proj.bias" in weights,
            "tie_word_embeddings": torch.equal(head, embeddings),
        }
    )
    with torch.device("meta"):
        wanted = FGPTForCausalLM(config).state_dict()
    for name, tensor in wanted.items():
        if name.endswith(".bias"):
            weights.setdefault(name, torch.zeros(tensor.shape, dtype=embeddings.dtype))
    for name in (*wanted, *weights):
        ours, theirs = (tuple(some[name].shape) if name in some else None for some in (wanted, weights))
        if ours != theirs:
            raise UserError(f"the weights do not fit together: {name} should be {ours} and is {theirs}")
    return config, weights
