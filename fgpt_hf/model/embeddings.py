"""The input and output embeddings of any model."""

from torch import Tensor
from transformers import PreTrainedModel


def token_embeddings(model: PreTrainedModel) -> Tensor:
    """Return the input embeddings, `(V, D)`.

    Example:
        >>> from fgpt_hf import FGPTConfig, FGPTForCausalLM
        >>> model = FGPTForCausalLM(FGPTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
        >>> token_embeddings(model).shape
        torch.Size([50304, 8])
    """
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)  # in torch's types, any attribute may be a module
    return weight


def output_embeddings(model: PreTrainedModel) -> Tensor | None:
    """Return the weight of the output head, `(V, D)`, or None if it has none of its own."""
    weight = getattr(model.get_output_embeddings(), "weight", None)
    return weight if isinstance(weight, Tensor) else None
