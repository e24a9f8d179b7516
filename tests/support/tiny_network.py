"""A tiny FGPT in which every weight matters, its twins in transformers, and inputs for both."""

from dataclasses import fields
from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    NanoChatConfig,
    NanoChatForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from fgpt_hf.model.configuration_fgpt import FGPTConfig
from fgpt_hf.model.modeling_fgpt import FGPTForCausalLM

VOCABULARY, CONTEXT = 96, 48
PAD = 2
STOCK: dict[str, tuple[Any, Any]] = {
    "qwen3": (Qwen3ForCausalLM, Qwen3Config),
    "llama": (LlamaForCausalLM, LlamaConfig),
    "nanochat": (NanoChatForCausalLM, NanoChatConfig),
}


def tiny_config(**changes: Any) -> FGPTConfig:
    """Return the shape of a network of two layers that reads 48 tokens."""
    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": 0,
        "eos_token_id": None,
        "pad_token_id": PAD,
    }
    return FGPTConfig(**shape | changes)


def tiny_model(model_class: type = FGPTForCausalLM, **changes: Any) -> FGPTForCausalLM:
    """Return a model in evaluation mode in which every weight and bias matters."""
    torch.manual_seed(0)
    model = model_class(tiny_config(**changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=1.0 if name.endswith("norm.weight") else 0.0, std=0.15)
    return model


def random_ids(*shape: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(1))


def gpt2_names(model: FGPTForCausalLM, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Arrange tensors shaped as FGPT's parameters under GPT-2's names and in its shapes."""
    named = {
        "transformer.wte.weight": tensors["model.embed_tokens.weight"],
        "transformer.wpe.weight": tensors["model.embed_positions.weight"],
    }
    for kind in ("weight", "bias"):
        named[f"transformer.ln_f.{kind}"] = tensors[f"model.norm.{kind}"]
        for index in range(model.config.num_hidden_layers):
            ours, theirs = f"model.layers.{index}", f"transformer.h.{index}"
            qkv = torch.cat([tensors[f"{ours}.self_attn.{name}_proj.{kind}"] for name in "qkv"])
            named[f"{theirs}.attn.c_attn.{kind}"] = qkv.T if kind == "weight" else qkv
            for mine, its in (
                ("self_attn.o_proj", "attn.c_proj"),
                ("mlp.up_proj", "mlp.c_fc"),
                ("mlp.down_proj", "mlp.c_proj"),
            ):
                tensor = tensors[f"{ours}.{mine}.{kind}"]
                named[f"{theirs}.{its}.{kind}"] = tensor.T if kind == "weight" else tensor
            named[f"{theirs}.ln_1.{kind}"] = tensors[f"{ours}.input_layernorm.{kind}"]
            named[f"{theirs}.ln_2.{kind}"] = tensors[f"{ours}.post_attention_layernorm.{kind}"]
    return named


def gpt2_twin(model: FGPTForCausalLM) -> GPT2LMHeadModel:
    """Return transformers' GPT-2 with the weights of an FGPT."""
    config = model.config
    shape: dict[str, Any] = {name: getattr(config, name) for name in config.attribute_map}
    special = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": PAD}
    twin = GPT2LMHeadModel(GPT2Config(vocab_size=config.vocab_size, **shape, **special)).eval()
    loaded = twin.load_state_dict(gpt2_names(model, dict(model.named_parameters())), strict=False)
    assert loaded.missing_keys == ["lm_head.weight"] and not loaded.unexpected_keys
    twin.tie_weights()
    return twin


def padded(side: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ids, mask and positions of three rows, two of them padded on a side."""
    ids, mask = random_ids(3, 12), torch.ones(3, 12, dtype=torch.long)
    for row, pads in enumerate((5, 0, 2)):
        mask[row, slice(0, pads) if side == "left" else slice(12 - pads, 12)] = 0
    return ids.masked_fill(mask == 0, PAD), mask, (mask.cumsum(-1) - 1).clamp(min=0)


def packed(*lengths: int) -> torch.Tensor:
    """Return the positions (1, T) of documents that share a row."""
    return torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)


MODERN: dict[
    str, dict[str, Any]
] = {  # networks of other blocks than GPT-2's, by the stock class that computes the same
    "qwen3": {
        **{"position_embedding": "rope", "norm": "rmsnorm", "qk_norm": True, "mlp": "gated", "hidden_act": "silu"},
        **{"attention_bias": False, "mlp_bias": False, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"head_dim": 8, "rope_parameters": {"rope_theta": 500.0}},
    },
    "llama": {
        **{"position_embedding": "rope", "norm": "rmsnorm", "mlp": "gated", "hidden_act": "silu"},
        **{"num_key_value_heads": 1, "tie_word_embeddings": False, "intermediate_size": 80},
    },
    "nanochat": {
        **{"position_embedding": "rope", "norm": "rmsnorm", "norm_elementwise_affine": False, "embedding_norm": True},
        **{"qk_norm": True, "hidden_act": "relu2", "attention_bias": False, "mlp_bias": False},
        **{"tie_word_embeddings": False, "final_logit_softcapping": 2.0},
    },
}
EVERY_NETWORK = {"gpt2": {}, **MODERN}


def stock_twin(model: FGPTForCausalLM, name: str) -> Any:
    """Return the network of transformers, of a key of `EVERY_NETWORK`, with the weights of an FGPT."""
    if name == "gpt2":
        return gpt2_twin(model)
    ours = model.config.to_dict() | {"rms_norm_eps": model.config.layer_norm_eps}
    kind, config_class = STOCK[name]
    shared = {each.name for each in fields(config_class)} - {"dtype", "architectures", "auto_map", "model_type"}
    twin = kind(config_class(**{key: value for key, value in ours.items() if key in shared})).eval()
    loaded = twin.load_state_dict(_stock_names(model) if name == "nanochat" else model.state_dict(), strict=True)
    assert not loaded.missing_keys
    return twin


def _stock_names(model: FGPTForCausalLM) -> dict[str, torch.Tensor]:
    """Return the weights as nanochat's are: it turns the other way, so the halves of queries and keys change places."""
    renamed, pairs = {}, model.config.hidden_size // model.config.num_attention_heads // 2
    for name, weight in model.state_dict().items():
        if "q_proj" in name or "k_proj" in name:
            weight = weight.unflatten(0, (-1, 2, pairs)).flip(1).flatten(0, 2)
        renamed[name.replace("mlp.up_proj", "mlp.fc1").replace("mlp.down_proj", "mlp.fc2")] = weight
    return renamed
