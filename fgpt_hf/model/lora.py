"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685), by PEFT."""

from importlib.util import find_spec
from pathlib import Path

from safetensors.torch import load_file
from transformers import PreTrainedModel

from fgpt_hf.config.runs import Run, TuningRun
from fgpt_hf.errors import UserError
from fgpt_hf.model.configuration_fgpt import FGPTConfig
from fgpt_hf.model.modeling_fgpt import FGPTForCausalLM
from fgpt_hf.model.shapes import linear_layers
from fgpt_hf.tokenizer.tokenizer import CONTROL_TOKENS, ROLE_TOKENS

ADAPTER = "adapter_model.safetensors"


def add_adapter(model: FGPTForCausalLM, run: TuningRun) -> None:
    """Freeze the model but for new adapters and the rows of the role tokens, which a base model has never seen.

    The model keeps its class, and saves the adapter alone.

    Raises:
        UserError: PEFT is not installed, or the model has no layers of the given names.
    """
    if find_spec("peft") is None:
        raise UserError("use_peft=true needs PEFT: pip install 'fgpt-hf[peft]', or leave it out")
    from peft import LoraConfig  # takes seconds, which most runs do without

    targets = _targets(run)
    layers = linear_layers(model.config)
    # Neither the embeddings nor the head, which is tied to them, can have an adapter beside the role tokens' rows.
    if targets != "all-linear" and not all(any(_ends_in(layer, target) for layer in layers) for target in targets):
        raise UserError(
            f"lora_target_modules={run.lora_target_modules} names a layer that this model lacks: give all-linear, or "
            f"some of {', '.join(sorted({layer.rpartition('.')[2] for layer in layers}))}"
        )
    config = LoraConfig(
        r=run.lora_r,
        lora_alpha=run.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=run.lora_dropout,
        target_modules=targets,
        trainable_token_indices={"embed_tokens": [CONTROL_TOKENS[token] for token in ROLE_TOKENS]},
        task_type="CAUSAL_LM",
    )
    model.add_adapter(config)


def adapter_parameters(run: Run, config: FGPTConfig) -> int:
    """Return the number of parameters that `add_adapter` makes trainable; 0 if the run has no adapter."""
    if not (isinstance(run, TuningRun) and run.use_peft):
        return 0
    adapters = sum(run.lora_r * (inputs + outputs) for inputs, outputs in adapted_layers(run, config))
    return adapters + len(ROLE_TOKENS) * config.hidden_size


def adapted_layers(run: TuningRun, config: FGPTConfig) -> list[tuple[int, int]]:
    """Return the inputs and outputs of each layer with an adapter, by PEFT's rule: names end in a target's name."""
    targets = _targets(run)
    return [
        size
        for name, size in linear_layers(config).items()
        if targets == "all-linear" or any(_ends_in(name, target) for target in targets)
    ]


def has_adapter(model: PreTrainedModel) -> bool:
    """Return whether the model has an adapter, which alone is trained."""
    return hasattr(model, "peft_config")


def restore_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Load the adapter's weights from a folder."""
    from peft import set_peft_model_state_dict

    weights = load_file(folder / ADAPTER)
    set_peft_model_state_dict(model, {name.removeprefix("base_model.model."): w for name, w in weights.items()})


def merge_adapter_into(base: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """Return the base model with the adapter in a folder merged into its weights."""
    from peft import PeftModel

    merged: PreTrainedModel = PeftModel.from_pretrained(base, adapter).merge_and_unload()
    return merged


def _targets(run: TuningRun) -> list[str] | str:
    """Return the targets as PEFT takes them."""
    named = [name.strip() for name in run.lora_target_modules.split(",")]
    return named if named != ["all-linear"] else "all-linear"


def _ends_in(layer: str, target: str) -> bool:
    return f".{layer}".endswith(f".{target}")
