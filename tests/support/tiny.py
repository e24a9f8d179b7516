"""Small models with the project's tokenizer, for tests that score text."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Tokenizer, PreTrainedModel

from fgpt_hf import FGPTConfig, FGPTForCausalLM
from fgpt_hf.tokenizer.tokenizer import CONTROL_TOKENS, ROLE_TOKENS, build_tokenizer

CONTEXT = 64


@lru_cache(maxsize=1)
def tokenizer() -> GPT2Tokenizer:
    return build_tokenizer(CONTEXT)


def random_model(**changes: int | str) -> FGPTForCausalLM:
    """A network with weights so large that every token matters to every other one."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": CONTEXT,
    }
    model = FGPTForCausalLM(FGPTConfig(**shape | changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=1.0 if name.endswith("norm.weight") else 0.0, std=0.15)
    return model


def taught_to_answer(model: FGPTForCausalLM) -> FGPTForCausalLM:
    """The model with role tokens whose embeddings lie apart from those of unused tokens, as tuning leaves them."""
    with torch.no_grad():
        for token in ROLE_TOKENS:
            model.model.embed_tokens.weight[CONTROL_TOKENS[token]] += 1
    return model


def save(model: PreTrainedModel, folder: Path) -> Path:
    """A complete folder for `from_pretrained`."""
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
