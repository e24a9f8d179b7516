"""FGPT's configuration: GPT-2's options and newer ones, under the names that today's tools and plans look for.

This file is published with a model's weights, `blocks_fgpt.py` and `modeling_fgpt.py`, and imports transformers only.
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
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
POSITION_EMBEDDINGS = ("learned", "rope")
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")  # those that turn the whole of a head
GATED_ACTIVATIONS = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu"}  # names of papers for a gated MLP's activation


@strict
class FGPTConfig(PreTrainedConfig):
    """Configuration of an FGPT network. The defaults are the flagship, a GPT-2 with 712,035,360 parameters.

    GPT-2's names (`n_embd`, `n_layer`, `n_head`, …) are read and written as aliases.

    Args:
        vocab_size: rows of the token embeddings.
        hidden_size: width of the residual stream.
        intermediate_size: width of the MLP; by default four times `hidden_size`, and for a gated MLP, which has three
            matrices, 8/3 of it, rounded up to a multiple of 64.
        num_attention_heads: heads of queries in each layer.
        num_key_value_heads: heads of keys and values, each shared by as many query heads; by default one each.
        head_dim: size of a head; by default `hidden_size / num_attention_heads`.
        max_position_embeddings: context length in tokens. With rotary positions it can be raised after training.
        position_embedding: `learned` adds a learned vector to each token; `rope` rotates queries and keys (Su et al.
            2021, arXiv:2104.09864).
        rope_parameters: of rotary positions, as in transformers: `rope_theta` (by default 10,000), and with `rope_type`
            a scaling to longer contexts.
        norm: `layernorm` or `rmsnorm` (Zhang and Sennrich 2019, arXiv:1910.07467).
        norm_elementwise_affine: whether normalizations have weights.
        norm_bias: whether they have biases; by default if they are LayerNorms with weights.
        embedding_norm: normalize the embeddings before the first layer.
        qk_norm: normalize queries and keys within each head, before rotation (Henry et al. 2020, arXiv:2010.04245).
        mlp: `plain` is two projections; `gated` multiplies the activation by a third (Shazeer 2020, arXiv:2002.05202).
        hidden_act: any activation of transformers. GPT-2 and the flagship have the tanh approximation of GELU, and
            `gelu` is the exact one; `relu2` is ReLU squared (So et al. 2021, arXiv:2109.08668), and `silu` with
            `mlp="gated"` is SwiGLU.
        attention_bias: whether the four attention projections have biases.
        mlp_bias: whether the projections of the MLP have biases.
        tie_word_embeddings: whether the output head shares the weights of the token embeddings.
        final_logit_softcapping: cap logits smoothly at plus and minus this number (Gemma 2, arXiv:2408.00118).
        layer_norm_eps: added to the variance in every normalization, of either kind.
        initializer_range: standard deviation of the initial weights.
        zero_init_residual: start the projections that feed the residual stream at zero, so that a new network is the
            identity from its embeddings to its last normalization.

    Raises:
        ValueError: a size is not positive, heads do not divide, a switch has an unknown value, or values contradict
            each other.

    Example:
        >>> config = FGPTConfig(hidden_size=768, num_hidden_layers=12, num_attention_heads=12)
        >>> config.intermediate_size, config.n_embd, config.head_dim
        (3072, 768, 64)
        >>> FGPTConfig(position_embedding="rope", mlp="gated", hidden_act="silu", hidden_size=768).rope_parameters
        {'rope_theta': 10000.0, 'rope_type': 'default'}
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
    vocab_size: int = 50304  # GPT-2's 50257 tokens and five more, rounded up to a multiple of 64
    hidden_size: int = 1296
    intermediate_size: int | None = None
    num_hidden_layers: int = 32
    num_attention_heads: int = 24
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 1024
    position_embedding: str = "learned"
    rope_parameters: dict[str, Any] | None = None
    norm: str = "layernorm"
    norm_elementwise_affine: bool = True
    norm_bias: bool | None = None
    embedding_norm: bool = False
    qk_norm: bool = False
    mlp: str = "plain"
    hidden_act: str = "gelu_pytorch_tanh"
    attention_bias: bool = True
    mlp_bias: bool = True
    final_logit_softcapping: float | int | None = None
    layer_norm_eps: float | int = 1e-5
    initializer_range: float | int = 0.02
    zero_init_residual: bool = False
    embedding_dropout: float | int = 0.0
    residual_dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    use_cache: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256
    pad_token_id: int | None = 50261

    def __post_init__(self, **kwargs: Any) -> None:
        """Apply aliases, derive what was left out, and validate."""
        is_rope = self.position_embedding == "rope"
        has_rope_parameters = self.rope_parameters or kwargs.get("rope_scaling") or "rope_theta" in kwargs
        super().__post_init__(**kwargs)
        for name in self.attribute_map.values():
            setattr(self, name, getattr(self, name))  # checks the type of a value given under an alias
        if not (is_rope or has_rope_parameters):
            self.rope_parameters = None  # transformers has filled in its defaults
        if self.intermediate_size is None:
            self.intermediate_size = self._default_intermediate_size()
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.norm_bias is None:
            self.norm_bias = self.norm == "layernorm" and self.norm_elementwise_affine
        self._derive_head_dim()
        # @strict calls this too, but wraps its ValueError in an error of another type.
        self.validate_architecture()

    def _default_intermediate_size(self) -> int:
        """Return the width of an MLP with about 8 C² parameters, C the width of the residual stream."""
        return -(-8 * self.hidden_size // 3 // 64) * 64 if self.mlp == "gated" else 4 * self.hidden_size

    def _derive_head_dim(self) -> None:
        if self.head_dim is None and self.num_attention_heads > 0:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size={self.hidden_size} must divide evenly among "
                    f"num_attention_heads={self.num_attention_heads}, or give head_dim"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads

    def validate_architecture(self) -> None:
        """Raise ValueError unless the fields describe a network that can be built.

        The names of normalizations and MLPs are known to the network alone, which refuses others.
        """
        for name in SIZES:
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        assert self.num_key_value_heads is not None  # derived above
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} must divide "
                f"num_attention_heads={self.num_attention_heads}: each is shared by as many query heads"
            )
        if self.final_logit_softcapping is not None and self.final_logit_softcapping <= 0:
            raise ValueError(
                f"final_logit_softcapping={self.final_logit_softcapping} must be above zero: leave it out for no cap"
            )
        if self.norm_bias and not (self.norm != "rmsnorm" and self.norm_elementwise_affine):
            raise ValueError("norm_bias=true needs norm='layernorm' and norm_elementwise_affine=true")
        self._validate_activation()
        self._validate_positions()

    def _validate_activation(self) -> None:
        if activation := GATED_ACTIVATIONS.get(self.hidden_act):
            raise ValueError(f"hidden_act={self.hidden_act!r} is hidden_act={activation!r} with mlp='gated'")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act={self.hidden_act!r} is unknown; choose from {', '.join(sorted(ACT2FN))}")

    def _validate_positions(self) -> None:
        if self.position_embedding not in POSITION_EMBEDDINGS:
            known = ", ".join(POSITION_EMBEDDINGS)
            raise ValueError(f"position_embedding={self.position_embedding!r} is unknown; choose from {known}")
        if self.position_embedding == "rope":
            self._validate_rope_parameters(self.rope_parameters or {})
        elif self.rope_parameters is not None:
            raise ValueError(f"rope_parameters={self.rope_parameters} need position_embedding='rope'")

    def _validate_rope_parameters(self, rope: dict[str, Any]) -> None:
        assert self.head_dim is not None  # derived above
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim} must be even: position_embedding='rope' rotates pairs of values"
            )
        rope_type = rope.get("rope_type", "default")
        if rope_type not in ROPE_TYPES:
            raise ValueError(f"rope_type={rope_type!r} is unknown; choose from {', '.join(ROPE_TYPES)}")
        if rope.get("partial_rotary_factor", 1) != 1:
            raise ValueError("partial_rotary_factor must be 1: the whole head is rotated")
        theta = rope.get("rope_theta")
        if not (isinstance(theta, (int, float)) and theta > 0):
            raise ValueError(f"rope_theta={theta!r} must be a number above zero")
        try:
            self.validate_rope()
        except (KeyError, TypeError) as error:  # what is missing or of another type for this rope_type
            reason = error.args[0]
            raise ValueError(f"rope_parameters={rope} do not describe rope_type={rope_type!r}: {reason}") from error
        trained, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
        longest = factor * trained if trained and factor else self.max_position_embeddings
        if rope_type in ("yarn", "longrope") and self.max_position_embeddings > longest:
            raise ValueError(
                f"max_position_embeddings={self.max_position_embeddings} is longer than the {longest:.0f} tokens that "
                f"rope_parameters scale to: factor={factor} times original_max_position_embeddings={trained}"
            )

    @property
    def base_model_tp_plan(self) -> dict[str, str]:
        """How tensor parallelism divides the modules that this network has.

        transformers before 5.23 also writes to it, which changes nothing.
        """
        attention = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "colwise") | {"o_proj": "rowwise"}
        if self.qk_norm and self.norm_elementwise_affine:
            attention |= dict.fromkeys(("q_norm", "k_norm"), "replicated_with_grad_allreduce")
        mlp = {"up_proj": "colwise", "down_proj": "rowwise"} | ({"gate_proj": "colwise"} if self.mlp == "gated" else {})
        return {f"layers.*.self_attn.{name}": rule for name, rule in attention.items()} | {
            f"layers.*.mlp.{name}": rule for name, rule in mlp.items()
        }

    @base_model_tp_plan.setter
    def base_model_tp_plan(self, plan: dict[str, str]) -> None: ...

    @property
    def base_model_pp_plan(self) -> dict[str, tuple[list[str], list[str]]]:  # type: ignore[override]
        """What goes into and comes out of the parts that pipeline parallelism can divide this network into."""
        table = {"embed_positions": (["position_ids"], ["position_embeds"])}
        return {
            "embed_tokens": (["input_ids"], ["inputs_embeds"]),
            **(table if self.position_embedding == "learned" else {}),
            "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
            "norm": (["hidden_states"], ["hidden_states"]),
        }

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
