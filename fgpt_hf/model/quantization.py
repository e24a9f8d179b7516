"""Frozen weights in 4 bits under adapters (QLoRA, Dettmers et al. 2023, arXiv:2305.14314), by bitsandbytes."""

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from fgpt_hf.errors import UserError, one_line
from fgpt_hf.model.lora import require_peft

_REARRANGES = "support_avx512bf16_for_cpu"  # an attribute of bitsandbytes' layers
BITS_PER_WEIGHT = 4.13  # 64 of them share a scale of 8 bits, and 256 scales one of 32


def four_bit_options(device: torch.device, compute_dtype: torch.dtype) -> dict[str, Any]:
    """Return what `from_pretrained` takes to load all linear layers but the head in 4 bits.

    Args:
        compute_dtype: the type that they are multiplied in.

    Raises:
        UserError: PEFT or bitsandbytes is not installed, or bitsandbytes does not serve the device.
    """
    require_peft("load_in_4bit=true")
    if find_spec("bitsandbytes") is None:
        raise UserError("load_in_4bit needs bitsandbytes: pip install 'fgpt-hf[qlora]'")
    from bitsandbytes import supported_torch_devices
    from transformers import BitsAndBytesConfig

    if device.type not in supported_torch_devices:
        raise UserError(
            f"load_in_4bit needs a device that bitsandbytes serves ({', '.join(sorted(supported_torch_devices))}), and "
            f"this is a {device.type}: leave it out, since --use_peft trains adapters on whole weights too"
        )
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )
    return {"quantization_config": quantization, "device_map": {"": device}}


def require_four_bit_layers(name: str, model: PreTrainedModel) -> None:
    """Raise UserError if a model's own code reads the weights of its layers, as Mamba's does, which are in 4 bits."""
    try:
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=model.device), use_cache=False)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UserError(
            f"load_in_4bit: a {type(model).__name__} cannot compute with layers in 4 bits ({one_line(error)}): leave "
            f"it out for {name}"
        ) from error


def keep_differentiable(model: nn.Module) -> None:
    """Let 4-bit layers pass gradients on after an evaluation on a CPU with bfloat16 arithmetic.

    There, bitsandbytes rearranges and rounds the weights of a layer when it is evaluated, for a kernel without a
    gradient that it then uses in training too.
    """
    for layer in model.modules():
        if hasattr(layer, _REARRANGES):
            setattr(layer, _REARRANGES, False)
