"""Groups of options that only runs on conversations and preferences have."""

from dataclasses import dataclass
from typing import Literal

from fgpt_hf.config.options import option

PreferenceLoss = Literal["sigmoid", "ipo", "simpo"]


@dataclass(frozen=True, kw_only=True)
class LoRAOptions:
    """Low-rank adapters (PEFT) instead of training all weights."""

    use_peft: bool = option(
        False, "Train LoRA adapters and the embeddings of the role tokens, and nothing else.", fixed_on_resume=True
    )
    load_in_4bit: bool = option(
        False,
        "Hold the frozen weights under the adapters in 4 bits (QLoRA), an eighth of their memory; needs bitsandbytes.",
        fixed_on_resume=True,
    )
    lora_r: int = option(16, "Rank of the adapters.", fixed_on_resume=True)
    lora_alpha: float = option(
        32, "Scale of the adapters: their output is multiplied by lora_alpha / lora_r.", fixed_on_resume=True
    )
    lora_dropout: float = option(0.0, "Dropout probability applied to the adapters' inputs.", minimum=0, below=1)
    lora_target_modules: str = option(
        "all-linear", "Layers with an adapter, by name and separated by commas, or all-linear.", fixed_on_resume=True
    )
    merge_adapter: bool = option(
        True,
        "Merge the adapters into the model at the end; false saves the adapters alone.",
    )


@dataclass(frozen=True, kw_only=True)
class PreferenceLossOptions:
    """The preference loss. The names are TRL's."""

    loss_type: PreferenceLoss = option(
        "sigmoid",
        "Loss: sigmoid is DPO, ipo is IPO, simpo is SimPO, which needs no reference model.",
        fixed_on_resume=True,
    )
    beta: float = option(
        0.1,
        "Strength of the KL penalty: higher values keep the model closer to the reference model. For simpo, which has "
        "none, the scale of the rewards.",
        fixed_on_resume=True,
    )
    label_smoothing: float = option(
        0.0,
        "Assumed fraction of pairs whose labels are swapped; at 0.5 neither reply would be preferred. Not for ipo.",
        minimum=0,
        below=0.5,
        fixed_on_resume=True,
    )
    simpo_gamma: float = option(
        0.5, "Target margin between the rewards, for simpo only.", minimum=0, fixed_on_resume=True
    )
