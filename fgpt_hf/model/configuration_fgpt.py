"""FGPT's configuration: GPT-2's options under the names that today's tools and parallelism plans look for.

This file is published with a model's weights, beside `modeling_fgpt.py`, and imports transformers only.
"""

import os
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)


@strict
class FGPTConfig(PreTrainedConfig):
    """Configuration of an FGPT network. The defaults are the flagship with 712,035,360 parameters.

    GPT-2's names (`n_embd`, `n_layer`, `n_head`, …) are read and written as aliases.

    Args:
        vocab_size: rows of the token embeddings.
        hidden_size: width of the residual stream; a multiple of `num_attention_heads`.
        intermediate_size: width of the MLP; by default four times `hidden_size`.
        max_position_embeddings: context length in tokens.
        hidden_act: any activation of transformers. GPT-2 and the flagship have the tanh approximation of GELU; `"gelu"`
            is the exact one.
        attention_bias: whether the four attention projections have biases.
        mlp_bias: whether the two MLP projections have biases.
        initializer_range: standard deviation of the initial weights.

    Raises:
        ValueError: a size is not positive, the heads do not divide the width, or the activation is unknown.

    Example:
        >>> config = FGPTConfig(hidden_size=768, num_hidden_layers=12, num_attention_heads=12)
        >>> config.intermediate_size, config.n_embd
        (3072, 768)
    """

    model_type = "fgpt"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "n_positions": "max_position_embeddings",
        "n_embd": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_inner": "intermediate_size",
        "activation_function": "hidden_act",
        "layer_norm_epsilon": "layer_norm_eps",
        "embd_pdrop": "embedding_dropout",
        "resid_pdrop": "residual_dropout",
        "attn_pdrop": "attention_dropout",
    }
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "embed_positions": (["position_ids"], ["position_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 50304  # GPT-2's 50257 tokens and five more, rounded up to a multiple of 64
    hidden_size: int = 1296
    intermediate_size: int | None = None
    num_hidden_layers: int = 32
    num_attention_heads: int = 24
    max_position_embeddings: int = 1024
    hidden_act: str = "gelu_pytorch_tanh"
    attention_bias: bool = True
    mlp_bias: bool = True
    layer_norm_eps: float | int = 1e-5
    initializer_range: float | int = 0.02
    embedding_dropout: float | int = 0.0
    residual_dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    use_cache: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256
    pad_token_id: int | None = 50261

    def __post_init__(self, **kwargs: Any) -> None:
        """Apply aliases, derive `intermediate_size`, and validate."""
        super().__post_init__(**kwargs)
        for name in self.attribute_map.values():
            setattr(self, name, getattr(self, name))  # checks the type of a value given under an alias
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        # @strict calls this too, but wraps its ValueError in an error of another type.
        self.validate_architecture()

    def validate_architecture(self) -> None:
        """Raise ValueError unless the fields describe a network that can be built."""
        for name in SIZES:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} must divide evenly among "
                f"num_attention_heads={self.num_attention_heads}"
            )
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act={self.hidden_act!r} is unknown; choose from {sorted(ACT2FN)}")

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save the configuration and its code, with an `auto_map` entry for every Auto class.

        transformers by itself writes the entry of the saved model's class only.
        """
        self.auto_map = {
            "AutoConfig": "configuration_fgpt.FGPTConfig",
            "AutoModel": "modeling_fgpt.FGPTModel",
            "AutoModelForCausalLM": "modeling_fgpt.FGPTForCausalLM",
        }
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)


FGPTConfig.register_for_auto_class()
