"""Low-rank adapters in place of all weights, by PEFT (Hu et al. 2021, arXiv:2106.09685)."""

from importlib.util import find_spec
from pathlib import Path

from safetensors.torch import load_file
from transformers import PreTrainedModel

from fgpt_hf.runs import TuningRun
from fgpt_hf.tokenizer import CONTROL_TOKENS, ROLE_TOKENS

ADAPTER = "adapter_model.safetensors"


def add_adapter(model: PreTrainedModel, run: TuningRun) -> None:
    """Let only adapters learn, and the rows of the role tokens, which a base model has never seen.

    The model stays what it is, adapters inside; it saves them alone.

    Raises:
        ValueError: PEFT is not installed; the model has no such layers.
    """
    if find_spec("peft") is None:
        raise ValueError("use_peft=true needs PEFT: pip install 'fgpt-hf[peft]', or leave it out")
    from peft import LoraConfig  # here, because it takes seconds and most runs do without

    named = [name.strip() for name in run.lora_target_modules.split(",")]
    config = LoraConfig(
        r=run.lora_r,
        lora_alpha=run.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=run.lora_dropout,
        target_modules=named if named != ["all-linear"] else "all-linear",
        trainable_token_indices={"embed_tokens": [CONTROL_TOKENS[token] for token in ROLE_TOKENS]},
        task_type="CAUSAL_LM",
    )
    try:
        model.add_adapter(config)
    except ValueError as error:
        layers = sorted({name.rpartition(".")[2] for name, _ in model.named_modules() if name.endswith("_proj")})
        raise ValueError(
            f"lora_target_modules={run.lora_target_modules} names no layer of this model: give all-linear, or some of "
            f"{', '.join(layers)}"
        ) from error


def has_adapter(model: PreTrainedModel) -> bool:
    """Whether only an adapter of the model learns."""
    return hasattr(model, "peft_config")


def restore_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Give a model's adapter the weights that were saved to a folder."""
    from peft import set_peft_model_state_dict

    weights = load_file(folder / ADAPTER)
    set_peft_model_state_dict(model, {name.removeprefix("base_model.model."): w for name, w in weights.items()})


def merged(base: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """The base model with what the adapter of a folder has learnt."""
    from peft import PeftModel

    return PeftModel.from_pretrained(base, adapter).merge_and_unload()
