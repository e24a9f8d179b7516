"""The network of a run: its configuration, its parameters, and the operations that a token takes.

It is counted on torch's meta device, without memory (`model.shapes`).
"""

from dataclasses import fields
from typing import NamedTuple

from transformers import PreTrainedConfig

from fgpt_hf.config.option_groups import NetworkOptions
from fgpt_hf.config.runs import BaseRun, Run
from fgpt_hf.errors import UserError
from fgpt_hf.model.configuration_fgpt import FGPTConfig
from fgpt_hf.model.lora import adapter_parameters
from fgpt_hf.model.run_tokenizer import vocabulary_of
from fgpt_hf.model.shapes import NetworkShape, shape_of

Network = PreTrainedConfig | NetworkShape


class ParameterCounts(NamedTuple):
    """Parameters of a network.

    Attributes:
        matrices: of the layers.
        token_embeddings: of the input, and of the output too where both are tied.
        output_head: zero where it is tied.
        vectors: biases and normalizations.
    """

    matrices: int = 0
    token_embeddings: int = 0
    output_head: int = 0
    position_embeddings: int = 0
    vectors: int = 0

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(self)

    @property
    def multiplied(self) -> int:
        """Those that each token is multiplied with: all but embeddings that are only looked up."""
        return self.total - self.position_embeddings - (self.token_embeddings if self.output_head else 0)


def network_config(run: BaseRun) -> FGPTConfig:
    """Return the configuration of the network that a run trains, with embeddings for the run's tokenizer.

    Raises:
        UserError: the shape is impossible, such as a width that does not divide among the heads, a switch has an
            unknown value, or there is no such tokenizer.
    """
    options = {each.name: getattr(run, each.name) for each in fields(NetworkOptions)}
    dropout, theta = options.pop("dropout"), options.pop("rope_theta")
    options |= dict.fromkeys(("embedding_dropout", "residual_dropout", "attention_dropout"), dropout)
    if theta is not None:
        options["rope_parameters"] = {"rope_theta": theta}
    try:
        config = FGPTConfig(**options, **vocabulary_of(run), max_position_embeddings=run.max_position_embeddings)
        shape_of(config)  # the network alone knows the names of its blocks
    except ValueError as error:  # both are published without this package's UserError
        raise UserError(str(error)) from error
    return config


def count_parameters(config: Network) -> ParameterCounts:
    """Count the parameters of a network of this shape.

    Example:
        >>> count_parameters(FGPTConfig()).total
        712035360
    """
    return ParameterCounts(**shape_of(config).sizes)


def flops_per_token(run: Run, config: Network) -> int:
    """Return the FLOPs of a token's forward and backward pass: 6 N + 12 layers x width x length.

    The formula is that of Chowdhery et al. 2022 (PaLM), appendix B, where width is that of all heads together. As in
    nanoGPT, N leaves out embeddings that are looked up and not multiplied. The causal mask saves nothing, and
    recomputed activations count once. Frozen weights have no gradients, a third of the work, so they count 4 N. The
    embeddings under an adapter do have them, because the rows of the role tokens are trained. Of the output head only
    the tokens of a sampled softmax count.

    Example:
        >>> from fgpt_hf.config.presets import PRESETS
        >>> f"{flops_per_token(PRESETS['fgpt-712m'], network_config(PRESETS['fgpt-712m'])):.3g}"
        '4.77e+09'
    """
    config = shape_of(config)
    counts, adapter = count_parameters(config), adapter_parameters(run, config)
    length = run.sequence_length(config.max_position_embeddings)
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * length
    frozen = counts.matrices + counts.vectors if adapter else 0
    sampled = getattr(run, "sampled_softmax", None) or config.vocab_size
    not_sampled = config.hidden_size * max(0, config.vocab_size - sampled)
    return 6 * (counts.multiplied - not_sampled + adapter) - 2 * frozen + attention
