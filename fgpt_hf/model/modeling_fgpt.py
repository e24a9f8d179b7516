"""FGPT: GPT-2's network, and newer blocks that its configuration switches on, built from parts of transformers.

This file is published with a model's weights. It imports torch, transformers, `configuration_fgpt.py` and
`blocks_fgpt.py` only.

Legend: B rows, T tokens of a row, S key slots that a query can see (cache and padding included), C width, V vocabulary.
"""

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.utils import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.processing_utils import Unpack  # type: ignore[attr-defined]  # Python's own since 3.11
from transformers.utils.generic import (
    TransformersKwargs,
    can_return_tuple,
    is_flash_attention_requested,
    merge_with_config_defaults,
)
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import capture_outputs

from .blocks_fgpt import FGPTAttention, FGPTLayer, normalization
from .configuration_fgpt import FGPTConfig

VARLEN_ATTENTION = "varlen_attention"  # registered by fgpt_hf; reads document bounds, as flash attention does


class FGPTPreTrainedModel(PreTrainedModel):
    """Base class of the FGPT models: what they support, and the initialization of their weights."""

    config: FGPTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["FGPTLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": FGPTLayer, "attentions": FGPTAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw weights from N(0, initializer_range), scaled by 1 / sqrt(2 * layers) where they feed the residuals.

        Each layer adds to the residual stream twice; the scale keeps the variance from growing with depth (Radford et
        al. 2019, section 2.3). With `zero_init_residual` it is zero, and all other weights draw the same numbers.
        """
        super()._init_weights(module)
        if isinstance(module, nn.Linear) and getattr(module, "feeds_residual", False):
            scale = 0.0 if self.config.zero_init_residual else (2 * self.config.num_hidden_layers) ** -0.5
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range * scale)


class FGPTModel(FGPTPreTrainedModel):
    """The network without its head: token ids to final hidden states."""

    def __init__(self, config: FGPTConfig) -> None:
        super().__init__(config)
        config.validate_architecture()  # it may have been changed since it was made
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = self.rotary_emb = None
        if config.position_embedding == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        else:
            self.rotary_emb = LlamaRotaryEmbedding(config)  # type: ignore[arg-type]  # it reads rope_parameters alone
        self.embedding_norm = normalization(config, config.hidden_size) if config.embedding_norm else nn.Identity()
        self.embedding_dropout = nn.Dropout(config.embedding_dropout)
        self.layers = nn.ModuleList([FGPTLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = normalization(config, config.hidden_size)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(  # type: ignore[misc]  # TransformersKwargs has position_ids too
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """Return the final hidden states, `(B, T, C)`.

        Args:
            input_ids: `(B, T)`.
            attention_mask: `(B, S)`, 0 at padding.
            position_ids: `(B, T)` or `(1, T)`; by default they continue from the cache. Rows padded on the left need
                them, as `generate` derives them. In rows that pack several documents they start again at 0 for each
                document, with neither mask nor cache given: then no token sees another document.
            inputs_embeds: `(B, T, C)`, instead of `input_ids`.

        Raises:
            ValueError: a position is past the context, or not exactly one of `input_ids` and `inputs_embeds` is given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        self._check_context(inputs_embeds.shape[1], position_ids, past_key_values)

        # Packed documents are detected only where there is no mask and no cache.
        reads_bounds = self.config._attn_implementation == VARLEN_ATTENTION or is_flash_attention_requested(self.config)
        has_bounds = reads_bounds and attention_mask is None and past_key_values is None
        if has_bounds and position_ids is not None and "cu_seq_lens_q" not in kwargs:
            kwargs.update(document_bounds(position_ids.expand(inputs_embeds.shape[0], -1)))
        causal_mask = None
        if not has_bounds or "cu_seq_lens_q" not in kwargs:
            # The mask and the layers get position_ids as given, without defaults: transformers would search them for
            # packed documents, which costs a wait for the device in each step and a full mask in a compiled one.
            causal_mask = create_causal_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
                layer_idx=self._first_layer,
            )
        positions = self._positions(inputs_embeds, position_ids, past_key_values)
        hidden_states = self._embed(inputs_embeds, positions) if self._first_layer == 0 else inputs_embeds
        rotation = None if self.rotary_emb is None else self.rotary_emb(hidden_states, positions)
        # Only now, because packed documents are detected only if there is no cache.
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=causal_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                rotation=rotation,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    @property
    def _first_layer(self) -> int:
        """The index of the first layer held here: 0, or in a later stage of a pipeline the first that is no identity.

        Such a stage has no cache for the layers before, and gets hidden states with positions as `inputs_embeds`.
        """
        return next(index for index, layer in enumerate(self.layers) if not isinstance(layer, nn.Identity))

    def _check_context(self, tokens: int, position_ids: torch.Tensor | None, past_key_values: Cache | None) -> None:
        """Raise ValueError if a position is past the context, without making the host wait for the device.

        The check goes by lengths that the host knows: the slots of the cache (all of them, if it is static) or else the
        tokens of the row. Positions given without a cache may start again within a longer row, so they are read: on the
        CPU, where that is free, or if the row is longer than the context. A traced graph cannot read them.
        """
        context = self.config.max_position_embeddings
        length = tokens
        if past_key_values is not None:
            length, _ = past_key_values.get_mask_sizes(tokens, self._first_layer)
        elif position_ids is not None:
            if is_tracing(position_ids) or (position_ids.device.type != "cpu" and length <= context):
                return
            length = int(position_ids.max()) + 1
        if length > context:
            raise ValueError(f"a sequence or cache of {length} tokens is longer than the context of {context} tokens")

    def _positions(
        self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor | None, past_key_values: Cache | None
    ) -> torch.Tensor:
        """Return the positions of the tokens, `(B or 1, T)`; by default they continue from the cache."""
        if position_ids is not None:
            return position_ids
        start = 0 if past_key_values is None else past_key_values.get_seq_length(self._first_layer)
        return (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + start).unsqueeze(0)

    def _embed(self, inputs_embeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return the states before the first layer, `(B, T, C)`."""
        if self.embed_positions is not None:  # the two embeddings may be on different devices
            inputs_embeds = inputs_embeds + self.embed_positions(positions).to(inputs_embeds.device)
        return self.embedding_dropout(self.embedding_norm(inputs_embeds))


def document_bounds(position_ids: torch.Tensor) -> TransformersKwargs:
    """Return the boundaries of the packed documents in all rows, `(B, T)`; FlashAttention itself reads only one row."""
    (queries, keys), (longest_query, longest_key) = prepare_fa_kwargs_from_position_ids(position_ids)
    if not is_tracing(position_ids):  # wait for the device once, here, instead of in each layer
        longest_query = longest_key = int(longest_query)
    lengths: TransformersKwargs = {"max_length_q": longest_query, "max_length_k": longest_key}
    return {"cu_seq_lens_q": queries, "cu_seq_lens_k": keys, **lengths}


def kept_states(states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """Return the states, of `(B, T, C)`, that get logits: the last `logits_to_keep` (0 for all), or those of a tensor.

    A tensor of one dimension names positions for all rows, and one of two for each row, as indices or as a mask.
    """
    if isinstance(logits_to_keep, int):
        return states[:, -logits_to_keep:]
    if logits_to_keep.ndim == 1:
        return states[:, logits_to_keep]
    if logits_to_keep.dtype == torch.bool:
        return states[logits_to_keep]
    return torch.take_along_dim(states, logits_to_keep[..., None], dim=1)


class FGPTForCausalLM(FGPTPreTrainedModel, GenerationMixin):
    """The language model: token ids to next-token logits."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # type: ignore[dict-item]
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: FGPTConfig) -> None:
        super().__init__(config)
        self.model = FGPTModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(  # type: ignore[misc]  # TransformersKwargs has position_ids too
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """Return the next-token logits, `(B, T, V)`, and with `labels` the loss in nats per token.

        Args (others are those of `FGPTModel.forward`):
            labels: `(B, T)`; label t is predicted by the logits of token t - 1, and -100 is ignored. The loss is the
                mean over the labels, or their sum divided by `num_items_in_batch`.
            logits_to_keep: compute logits only for this many last tokens (0 for all), or at these positions.

        Example:
            >>> config = FGPTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
            >>> model = FGPTForCausalLM(config).eval()
            >>> ids = torch.tensor([[15496, 11, 995]])  # Hello, world
            >>> outputs = model(input_ids=ids, labels=ids)
            >>> outputs.logits.shape, outputs.loss.shape
            (torch.Size([1, 3, 50304]), torch.Size([]))
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(kept_states(outputs.last_hidden_state, logits_to_keep))
        if cap := self.config.final_logit_softcapping:
            logits = cap * torch.tanh(logits / cap)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


FGPTModel.register_for_auto_class("AutoModel")
FGPTForCausalLM.register_for_auto_class("AutoModelForCausalLM")
