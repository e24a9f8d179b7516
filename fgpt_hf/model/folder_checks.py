"""Check a model's configuration before transformers reads it: others may have written it."""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub import get_local_safetensors_metadata
from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError
from transformers import PreTrainedConfig

from fgpt_hf.errors import UserError

MOST_LAYERS = 10_000
LARGEST_SIZE = 10**9  # of any one dimension: vocabulary, width, context, experts
MOST_PARAMETERS_PER_STORED = 16  # more than a quantized or a tied weight stands for
_SIZE = re.compile(r"(^|_)(num|n|size|dim|heads?|layers?|experts?|labels|positions?|embd|ctx)(_|$)")
_KERNELS = ("_attn_implementation", "attn_implementation", "_experts_implementation", "experts_implementation")


def check_config_file(name: str) -> None:
    """Refuse a configuration with sizes that no network has, code to download, or fields that replace methods.

    Raises:
        UserError: the first such field, or a file that holds no configuration.
        OSError: there is none.
    """
    fields, _ = PreTrainedConfig.get_config_dict(name)
    if not isinstance(fields, Mapping):
        raise UserError(f"the configuration of {name} should be a JSON object")
    for field, value in _all_fields(fields):
        if callable(getattr(PreTrainedConfig, field, None)):
            raise UserError(f"the configuration of {name} holds {field!r}, which is not a setting: remove it")
        if field in _KERNELS and "/" in str(value):
            raise UserError(
                f"the configuration of {name} asks for {field}={value!r}, code to be downloaded and run: remove it"
            )
        if isinstance(value, float) and math.isnan(value):
            raise UserError(f"the configuration of {name} is damaged: {field} is not a number")
        most = MOST_LAYERS if field.endswith(("layers", "layer")) else LARGEST_SIZE
        if isinstance(value, (int, float)) and _SIZE.search(field) and value > most:
            raise UserError(f"the configuration of {name} is damaged: {field}={_short(value)} is not a possible size")


def check_size(name: str, model: torch.nn.Module, bytes_per_parameter: int) -> None:
    """Refuse a network that its files do not fill, or that cannot be held in memory.

    Args:
        name: the model's folder, or its id on the Hub.
        model: the network that its configuration describes, without memory.

    Raises:
        UserError: one of the two.
    """
    parameters = sum(parameter.numel() for parameter in model.parameters())
    stored = _stored_values(Path(name))
    if stored and parameters > MOST_PARAMETERS_PER_STORED * stored:
        raise UserError(
            f"the configuration of {name} describes {parameters:,} parameters, and its files hold {stored:,} values"
        )
    needed, memory = parameters * bytes_per_parameter, psutil.virtual_memory().total
    if needed > memory:
        raise UserError(
            f"{name} has {parameters:,} parameters, {needed / 1e9:,.0f} GB, and this machine has {memory / 1e9:,.0f} GB"
        )


def _stored_values(folder: Path) -> int | None:
    """Return how many values the weight files of a folder hold, or None where that cannot be seen."""
    if not folder.is_dir():
        return None
    try:
        return sum(get_local_safetensors_metadata(folder).parameter_count.values())
    except (SafetensorsParsingError, NotASafetensorsRepoError):
        return None


def _all_fields(fields: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the fields of a configuration and of those inside it."""
    for name, value in fields.items():
        yield name, value
        if isinstance(value, Mapping):
            yield from _all_fields(value)


def _short(value: float) -> str:
    return f"{value:,}" if value < 10**15 else "more than 10**15"
