"""Frozen weights in 4 bits under adapters (QLoRA, Dettmers et al. 2023, arXiv:2305.14314), by bitsandbytes."""

from importlib.util import find_spec
from typing import Any

import torch

from fgpt_hf.errors import UserError

SERVED = ("cuda", "xpu")  # devices on which bitsandbytes multiplies with such weights
BITS_PER_WEIGHT = 4.5  # with the scales of its blocks


def four_bit_options() -> dict[str, Any]:
    """Return what `from_pretrained` takes to load the matrices of the layers in 4 bits, on this process's device.

    Raises:
        UserError: bitsandbytes is not installed, or does not serve the device.
    """
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if device.type not in SERVED:
        raise UserError(
            f"load_in_4bit needs a GPU that bitsandbytes serves ({' or '.join(SERVED)}), and this is a {device.type}: "
            "leave it out, since --use_peft trains adapters on whole weights too"
        )
    if find_spec("bitsandbytes") is None:
        raise UserError("load_in_4bit needs bitsandbytes: pip install 'fgpt-hf[qlora]'")
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"quantization_config": quantization, "device_map": {"": torch.accelerator.current_device_index()}}
