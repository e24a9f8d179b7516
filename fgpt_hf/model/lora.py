"""Low-rank adapters in place of all weights, by PEFT (Hu et al. 2021, arXiv:2106.09685)."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from safetensors.torch import load_file
from transformers import PreTrainedModel

from fgpt_hf.config.runs import Run, TuningRun
from fgpt_hf.errors import UserError
from fgpt_hf.model.configuration_fgpt import FGPTConfig
from fgpt_hf.model.modeling_fgpt import FGPTForCausalLM
from fgpt_hf.tokenizer.tokenizer import CONTROL_TOKENS, ROLE_TOKENS

ADAPTER = "adapter_model.safetensors"


def add_adapter(model: FGPTForCausalLM, run: TuningRun) -> None:
    """Let only adapters learn, and the rows of the role tokens, which a base model has never seen.

    The model stays what it is, adapters inside; it saves them alone.

    Raises:
        UserError: PEFT is not installed; the model has no such layers.
    """
    if find_spec("peft") is None:
        raise UserError("use_peft=true needs PEFT: pip install 'fgpt-hf[peft]', or leave it out")
    from peft import LoraConfig  # here, because it takes seconds and most runs do without

    targets = _targets(run)
    layers = [name for name, _ in _linear_layers(model.config)]
    # Neither the embeddings nor the head, which is tied to them, can have an adapter beside the role tokens' rows.
    if targets != "all-linear" and not all(any(_ends_in(layer, target) for layer in layers) for target in targets):
        raise UserError(
            f"lora_target_modules={run.lora_target_modules} names what is no layer of this model: give all-linear, or "
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
    """How many parameters `add_adapter` lets learn in a model of this shape; none where the run has no adapter."""
    if not (isinstance(run, TuningRun) and run.use_peft):
        return 0
    adapters = sum(run.lora_r * (inputs + outputs) for inputs, outputs in adapted_layers(run, config))
    return adapters + len(ROLE_TOKENS) * config.hidden_size


def adapted_layers(run: TuningRun, config: FGPTConfig) -> list[tuple[int, int]]:
    """The inputs and outputs of each linear layer that has an adapter: PEFT goes by the ends of their names."""
    targets = _targets(run)
    return [
        size
        for name, size in _linear_layers(config)
        if targets == "all-linear" or any(_ends_in(name, target) for target in targets)
    ]


def has_adapter(model: PreTrainedModel) -> bool:
    """Whether only an adapter of the model learns."""
    return hasattr(model, "peft_config")


def restore_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Give a model's adapter the weights that were saved to a folder."""
    from peft import set_peft_model_state_dict

    weights = load_file(folder / ADAPTER)
    set_peft_model_state_dict(model, {name.removeprefix("base_model.model."): w for name, w in weights.items()})


def merge_adapter_into(base: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """The base model with what the adapter of a folder has learnt."""
    from peft import PeftModel

    return PeftModel.from_pretrained(base, adapter).merge_and_unload()


def _targets(run: TuningRun) -> list[str] | str:
    """What PEFT is told to adapt."""
    named = [name.strip() for name in run.lora_target_modules.split(",")]
    return named if named != ["all-linear"] else "all-linear"


def _ends_in(layer: str, target: str) -> bool:
    return f".{layer}".endswith(f".{target}")


def _linear_layers(config: FGPTConfig) -> Iterator[tuple[str, tuple[int, int]]]:
    """The names of a network's linear layers, without the head, with their inputs and outputs."""
    width, inner = config.hidden_size, config.intermediate_size
    assert inner is not None  # the config derives it
    for layer in range(config.num_hidden_layers):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"model.layers.{layer}.self_attn.{name}", (width, width)
        yield f"model.layers.{layer}.mlp.up_proj", (width, inner)
        yield f"model.layers.{layer}.mlp.down_proj", (inner, width)
