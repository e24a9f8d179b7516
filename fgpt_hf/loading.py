"""A causal language model and its tokenizer, from a folder or from the Hub."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


def load_model(
    name: str, dtype: torch.dtype | str = torch.float32, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, in evaluation mode and of this type, or as it is stored where that is "auto", and its tokenizer.

    Raises:
        ValueError: there is none of that name, it is no causal language model, or something of it is damaged.
    """
    try:
        tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
        model = load_weights(AutoModelForCausalLM, name, dtype=dtype, trust_remote_code=trust_remote_code)
    except OSError as error:
        found = sorted(str(path.parent) for path in Path("runs").glob("**/model/config.json"))
        known = f" (here: {', '.join(found)})" if found else ""
        raise ValueError(
            f"no model {name!r}: give a folder with a config.json and a tokenizer{known}, or the id of a model on the "
            f"Hub; {str(error).splitlines()[0]}"
        ) from error
    return model.eval(), tokenizer


def load_tokenizer(name: str, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a model.

    Raises:
        ValueError: its files are damaged, or there are none.
        OSError: there is no such model.
    """
    try:
        return AutoTokenizer.from_pretrained(name, **options)
    except (ValueError, TypeError) as error:
        raise ValueError(f"the tokenizer of {name} cannot be loaded: {' '.join(str(error).split())}") from error


def load_weights(kind: Any, name: str, **options: Any) -> Any:
    """The model as `kind`, a class of models or an `Auto` class, each of its weights from its files.

    transformers gives weights that are not there random numbers, and says so in a log.

    Raises:
        ValueError: the files are damaged, lack weights, or do not fit the config.
        OSError: there is no such model.
    """
    try:
        model, found = kind.from_pretrained(name, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    except SafetensorError as error:
        raise ValueError(f"the weights of {name} are damaged: {error}") from error
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"{name} lacks {len(missing)} of its weights, such as {missing[0]}")
    if mismatched := sorted(key for key, *_ in found["mismatched_keys"]):
        raise ValueError(f"{len(mismatched)} weights of {name} do not have the shape in its config: {mismatched[0]}, …")
    return model
