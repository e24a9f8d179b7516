"""A causal language model and its tokenizer, from a folder or from the Hub."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


def load_model(
    name: str, dtype: torch.dtype | str = torch.float32, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, in evaluation mode and of this type, or as it is stored where that is "auto", and its tokenizer.

    Raises:
        ValueError: there is none of that name, or it is no causal language model.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, trust_remote_code=trust_remote_code)
    except OSError as error:
        found = sorted(str(path.parent) for path in Path("runs").glob("**/model/config.json"))
        known = f" (here: {', '.join(found)})" if found else ""
        raise ValueError(
            f"no model {name!r}: give a folder with a config.json and a tokenizer{known}, or the id of a model on the "
            f"Hub; {str(error).splitlines()[0]}"
        ) from error
    return model.eval(), tokenizer
