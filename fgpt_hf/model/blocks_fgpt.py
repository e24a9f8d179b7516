"""The blocks of the network: normalizations, attention, MLPs and layers, chosen by the switches of the configuration.

This file is published with a model's weights. It imports torch, transformers and `configuration_fgpt.py` only.

Legend: B rows, T tokens of a row, S key slots that a query can see (cache and padding included), H heads, D head size,
C width.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.processing_utils import Unpack  # type: ignore[attr-defined]  # Python's own since 3.11
from transformers.utils.generic import TransformersKwargs

from .configuration_fgpt import FGPTConfig

Choice = TypeVar("Choice")

PADDED_DEVICES = ("cuda",)  # their attention kernels need head sizes that are multiples of 8


def layer_norm(config: FGPTConfig, size: int) -> nn.Module:
    """Return a LayerNorm (Ba et al. 2016, arXiv:1607.06450)."""
    affine, bias = config.norm_elementwise_affine, bool(config.norm_bias)
    return nn.LayerNorm(size, eps=config.layer_norm_eps, elementwise_affine=affine, bias=bias)


def rms_norm(config: FGPTConfig, size: int) -> nn.Module:
    """Return an RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467)."""
    return FGPTRMSNorm(size, eps=config.layer_norm_eps, elementwise_affine=config.norm_elementwise_affine)


class FGPTRMSNorm(nn.RMSNorm):
    """An RMSNorm that computes in the type of its weights: on a CPU, unlike a GPU, autocast does not see to that."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize the last dimension."""
        return super().forward(x if self.weight is None else x.to(self.weight.dtype))


NORMS: Mapping[str, Callable[[FGPTConfig, int], nn.Module]] = {
    "layernorm": layer_norm,
    "rmsnorm": rms_norm,
}


def normalization(config: FGPTConfig, size: int) -> nn.Module:
    """Return a normalization over the last `size` values, of the kind that `config.norm` names."""
    return chosen(NORMS, config, "norm")(config, size)


def chosen(known: Mapping[str, Choice], config: FGPTConfig, switch: str) -> Choice:
    """Return what a switch of the configuration names; raise ValueError, with the known names, for an unknown one."""
    name = getattr(config, switch)
    if name not in known:
        raise ValueError(f"{switch}={name!r} is unknown; choose from {', '.join(known)}")
    return known[name]


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend by plain matrix products: the reference for fused kernels, and the implementation that returns weights.

    `query` is `(B, H, T, D)`; `key` and `value` are `(B, H / groups, S, D)`; `attention_mask`, `(B, 1, T, S)`, is added
    to the scores. Returns the attended values, `(B, T, H, D)`, and the weights, `(B, H, T, S)`.
    """
    key, value = (repeat_kv(heads, module.num_key_value_groups) for heads in (key, value))  # type: ignore[arg-type]  # a Module's attribute
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


class FGPTAttention(nn.Module):
    """Causal self-attention, computed by the function that `config._attn_implementation` names."""

    is_causal = True

    def __init__(self, config: FGPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        assert config.head_dim is not None and config.num_key_value_heads is not None  # the config derives them
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        width, bias = config.hidden_size, config.attention_bias
        queries, keys = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(width, queries, bias=bias)
        self.k_proj = nn.Linear(width, keys, bias=bias)
        self.v_proj = nn.Linear(width, keys, bias=bias)
        self.o_proj = residual_projection(queries, width, bias=bias)
        self.q_norm = normalization(config, self.head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = normalization(config, self.head_dim) if config.qk_norm else nn.Identity()
        # A module although only its rate is used, because tools that switch dropout off look for modules.
        self.attention_dropout = nn.Dropout(config.attention_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        rotation: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Map `(B, T, C)` to `(B, T, C)`; also return the weights, `(B, H, T, S)`, if the implementation gives them.

        `rotation` holds the cosines and sines, each `(B or 1, T, D)`, that rotate queries and keys.
        """
        rows_tokens = hidden_states.shape[:-1]
        by_head = (*rows_tokens, -1, self.head_dim)  # -1: under tensor parallelism a device has only some heads
        query = self.q_norm(self.q_proj(hidden_states).view(by_head)).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden_states).view(by_head)).transpose(1, 2)
        value = self.v_proj(hidden_states).view(by_head).transpose(1, 2)
        if rotation is not None:
            query, key = apply_rotary_pos_emb(query, key, *rotation)
        query, key = query.to(value.dtype), key.to(value.dtype)  # autocast normalizes and turns them in float32
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        attend: Callable[..., tuple[torch.Tensor, torch.Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.attention_dropout.p if self.training else 0.0
        query, key, value = pad_heads(query, key, value)
        attended, weights = attend(
            self, query, key, value, attention_mask, scaling=self.scaling, dropout=dropout, **kwargs
        )
        return self.o_proj(attended[..., : self.head_dim].reshape(*rows_tokens, -1)), weights


def pad_heads(*heads: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Pad the head size of query, key and value, `(B, H, T, D)`, with zeros to a multiple of 8 on a GPU.

    Fused kernels need that (the flagship's head size is 54). Without it, and with a mask as packed documents have,
    torch would form all scores in float32. A single query, as in generation, is not worth a copy of the cache.
    """
    padding = -heads[0].shape[-1] % 8
    if padding == 0 or heads[0].shape[2] == 1 or heads[0].device.type not in PADDED_DEVICES:
        return heads
    # Padded where the heads of a token lie side by side, as kernels over flattened rows take them without a copy.
    return tuple(nn.functional.pad(head.transpose(1, 2), (0, padding)).transpose(1, 2) for head in heads)


class FGPTMLP(nn.Module):
    """Two projections with an activation between them, applied to each token."""

    def __init__(self, config: FGPTConfig) -> None:
        super().__init__()
        assert config.intermediate_size is not None  # the config derives it
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]
        self.down_proj = residual_projection(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map `(B, T, C)` to `(B, T, C)`."""
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)))


class FGPTGatedMLP(FGPTMLP):
    """An MLP whose activated gate multiplies a second projection (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: FGPTConfig) -> None:
        super().__init__(config)
        assert config.intermediate_size is not None  # the config derives it
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map `(B, T, C)` to `(B, T, C)`."""
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


MLPS: Mapping[str, Callable[[FGPTConfig], nn.Module]] = {
    "plain": FGPTMLP,
    "gated": FGPTGatedMLP,
}


def residual_projection(inputs: int, outputs: int, bias: bool) -> nn.Linear:
    """Return a linear layer marked as feeding the residual stream, for `_init_weights`.

    The mark is an attribute because quantizers look for `nn.Linear` itself, not for subclasses. It is on the layer, not
    on its parent, because transformers does not initialize modules of custom code that own no parameter.
    """
    projection = nn.Linear(inputs, outputs, bias=bias)
    projection.feeds_residual = True  # type: ignore[assignment]
    return projection


class FGPTLayer(GradientCheckpointingLayer):
    """A pre-norm block: attention, then the MLP, each added to the residual stream."""

    def __init__(self, config: FGPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = normalization(config, config.hidden_size)
        self.self_attn = FGPTAttention(config, layer_idx)
        self.post_attention_layernorm = normalization(config, config.hidden_size)
        self.mlp = chosen(MLPS, config, "mlp")(config)
        self.residual_dropout = nn.Dropout(config.residual_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        rotation: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """Map `(B, T, C)` to `(B, T, C)`."""
        normed = self.input_layernorm(hidden_states)
        attended, _ = self.self_attn(normed, attention_mask, past_key_values, rotation, **kwargs)
        hidden_states = hidden_states + self.residual_dropout(attended)
        transformed = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states + self.residual_dropout(transformed)
