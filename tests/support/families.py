"""Small configurations of further families of causal models, beside the five of `any_models`.

model = family_model("gemma3")
"""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma3TextConfig,
    GPTNeoXConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from tests.support.any_models import any_tokenizer

NARROW: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2}
SHAPE: dict[str, Any] = {**NARROW, "intermediate_size": 48, "num_attention_heads": 4, "max_position_embeddings": 512}
GROUPED: dict[str, Any] = {**SHAPE, "num_key_value_heads": 2}
WINDOW: dict[str, Any] = {**GROUPED, "sliding_window": 4}
EXPERTS: dict[str, Any] = {**GROUPED, "num_experts_per_tok": 2}

FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "bloom": (BloomConfig, {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "falcon": (FalconConfig, {**NARROW, "num_attention_heads": 4}),
    "gemma3": (Gemma3TextConfig, {**WINDOW, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]}),
    "gpt_neox": (GPTNeoXConfig, SHAPE),
    "mamba": (MambaConfig, {**NARROW, "state_size": 4}),
    "mistral": (MistralConfig, WINDOW),
    "mixtral": (MixtralConfig, {**EXPERTS, "num_local_experts": 4}),
    "olmo2": (Olmo2Config, GROUPED),
    "olmo3": (Olmo3Config, {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}),
    "opt": (OPTConfig, {**NARROW, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_attention_heads": 4}),
    "phi3": (Phi3Config, GROUPED),
    "qwen3_moe": (Qwen3MoeConfig, {**EXPERTS, "head_dim": 8, "num_experts": 4, "moe_intermediate_size": 16}),
}
MIX_DOCUMENTS = ("bloom", "falcon", "mamba", "opt")  # no positions that restart, or none that packing is read from


def family_model(name: str, vocab_size: int = 96, **changes: Any) -> PreTrainedModel:
    """A random network of a family, of which every token matters to every later one."""
    config, fields = FAMILIES[name]
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    torch.manual_seed(0)
    made = config(**{"vocab_size": vocab_size, **ends, **fields, **changes})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(made).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.15 * torch.randn_like(parameter)
    return model


def save_family(name: str, folder: Path, **changes: Any) -> Path:
    """Write a complete model folder, with Llama's tokenizer of `any_models`."""
    tokenizer = any_tokenizer("llama")
    family_model(name, len(tokenizer), **changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
