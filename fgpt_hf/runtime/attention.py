"""Choose the attention of a run: what it names, or for `auto` what suits the device, the precision and packed rows."""

import logging

from accelerate import Accelerator
from transformers import PreTrainedModel
from transformers.utils.import_utils import (
    is_flash_attn_2_available,
    is_flash_attn_3_available,
    is_kernels_available,
)

from fgpt_hf.config.option_groups import is_hub_kernel
from fgpt_hf.config.runs import Run
from fgpt_hf.errors import UserError, first_line
from fgpt_hf.model.modeling_fgpt import VARLEN_ATTENTION

logger = logging.getLogger(__name__)

# What tells whether each is installed.
FLASH_ATTENTION = {"flash_attention_3": is_flash_attn_3_available, "flash_attention_2": is_flash_attn_2_available}
FLEX_ATTENTION = ("cuda", "xpu", "hpu")  # the devices on which it has a backward pass


def resolve_attn_implementation(run: Run, accelerator: Accelerator, attention_dropout: float = 0.0) -> str:
    """Return the attention implementation that the run names, or for `auto` the one that suits it.

    On CUDA in half precision that is flash attention 3 if its package is installed, else torch's kernel for packed
    rows; elsewhere, or with dropout of the attention's weights, `sdpa`.

    Raises:
        UserError: the run names one that is not installed, or that cannot train on this device, in its precision or
            with its dropout.
    """
    named, device = run.attn_implementation, accelerator.device.type
    runs_flash_kernels = device == "cuda" and accelerator.mixed_precision != "no"
    if named == "auto":
        if not runs_flash_kernels or attention_dropout:
            return "sdpa"
        return "flash_attention_3" if is_flash_attn_3_available() else VARLEN_ATTENTION
    is_kernel = is_hub_kernel(named)
    if named in FLASH_ATTENTION and not FLASH_ATTENTION[named]():
        raise UserError(f"attn_implementation={named} is not installed here: auto takes what is")
    if is_kernel and not is_kernels_available():
        raise UserError(f"attn_implementation={named} needs the package kernels: pip install 'fgpt-hf[kernels]'")
    if (named in FLASH_ATTENTION or is_kernel) and not runs_flash_kernels:
        raise UserError(f"attn_implementation={named} needs a CUDA GPU and --bf16 or --fp16: auto takes what works")
    if named == "flex_attention" and device not in FLEX_ATTENTION:
        raise UserError(f"attn_implementation=flex_attention cannot train on a {device}: auto takes what works")
    if named in (VARLEN_ATTENTION, "flex_attention") and attention_dropout:
        raise UserError(
            f"attn_implementation={named} has no dropout, and the attention's is {attention_dropout:g}: auto takes sdpa"
        )
    return named


def set_attention(model: PreTrainedModel, run: Run, name: str) -> None:
    """Let a model attend by an implementation; a kernel of the Hub is fetched now.

    Where the run leaves the choice to `auto`, a model that cannot attend by that one keeps its own.

    Raises:
        UserError: the kernel cannot be had, or the model cannot attend by the one that the run names.
    """
    try:
        model.set_attn_implementation(name)
    except (ImportError, ValueError) as error:  # what transformers makes of a missing kernel or network, or of a model
        if run.attn_implementation != "auto":
            raise UserError(f"attn_implementation={name} cannot be loaded: {first_line(error)}") from error
        logger.info("a %s keeps its own attention, since it cannot have %s", model.config.model_type, name)
