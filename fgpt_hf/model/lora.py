"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685), by PEFT."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from safetensors.torch import load_file
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME
from transformers.utils.peft_utils import find_adapter_config_file

from fgpt_hf.config.runs import Run, TuningRun
from fgpt_hf.errors import UserError, one_line
from fgpt_hf.files import read_json
from fgpt_hf.model.shapes import NetworkShape, shape_of
from fgpt_hf.tokenizer.tokenizer import ROLE_TOKENS, has_role_tokens

ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"


def add_adapter(model: PreTrainedModel, run: TuningRun, tokenizer: PreTrainedTokenizerBase) -> None:
    """Freeze the model except for new adapters and the rows of the project's role tokens, which base models never saw.

    The model keeps its class, and saves the adapter alone.

    Raises:
        UserError: PEFT is not installed or refuses the layers, or the model has none of the given names.
    """
    require_peft("use_peft=true")
    from peft import LoraConfig  # takes seconds, which most runs do without

    targets = _targets(run)
    shape = shape_of(model.config)
    layers = shape.linear_layers
    names = ", ".join(sorted({layer.rpartition(".")[2] for layer in layers}))
    # Neither the embeddings nor the head can have an adapter as well as the role tokens' rows.
    if targets != "all-linear" and not all(any(_ends_in(layer, target) for layer in layers) for target in targets):
        raise UserError(
            f"lora_target_modules={run.lora_target_modules} names a layer that this model lacks: give all-linear, or "
            f"some of {names}"
        )
    vocabulary = tokenizer.get_vocab()
    role_ids = [vocabulary[token] for token in ROLE_TOKENS] if has_role_tokens(tokenizer) else []
    config = LoraConfig(
        r=run.lora_r,
        lora_alpha=run.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=run.lora_dropout,
        target_modules=targets,
        trainable_token_indices=dict.fromkeys(shape.token_matrices, role_ids) if role_ids else None,
        task_type="CAUSAL_LM",
    )
    with _without_peft_warnings():
        try:
            model.add_adapter(config)
        except ValueError as error:  # such as for layers whose weights the model's own code reads
            problem = one_line(error).rstrip(".")
            raise UserError(
                f"lora_target_modules={run.lora_target_modules}: {problem}; the layers of this model are {names}"
            ) from error


def adapter_parameters(run: Run, config: PreTrainedConfig | NetworkShape) -> int:
    """Return the number of parameters that `add_adapter` makes trainable; 0 if the run has no adapter."""
    if not (isinstance(run, TuningRun) and run.use_peft):
        return 0
    config = shape_of(config)
    adapters = sum(run.lora_r * (inputs + outputs) for inputs, outputs in adapted_layers(run, config))
    return adapters + len(ROLE_TOKENS) * config.hidden_size * len(config.token_matrices)


def adapted_layers(run: TuningRun, config: NetworkShape) -> list[tuple[int, int]]:
    """Return the inputs and outputs of each layer with an adapter, by PEFT's rule: names end in a target's name."""
    targets = _targets(run)
    return [
        size
        for name, size in config.linear_layers.items()
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


def adapters_below(name: str) -> list[str]:
    """Return the base model of an adapter and every adapter on it up to `name`; of another model, its name alone.

    Raises:
        UserError: an adapter does not name its base model, or adapters name each other.
    """
    chain = [name]
    while config := _adapter_config(chain[0]):
        base = read_json(config).get("base_model_name_or_path")
        if not isinstance(base, str) or not base:
            raise UserError(f"{chain[0]} is an adapter, and its {ADAPTER_CONFIG} names no base_model_name_or_path")
        if base in chain:
            raise UserError(f"{chain[0]} is an adapter on {base}, which is an adapter on it: neither has whole weights")
        chain.insert(0, base)
    return chain


def merge_adapter_into(base: PreTrainedModel, adapter: str | Path) -> PreTrainedModel:
    """Return the base model with an adapter merged into its weights; the adapter's generation config comes with it.

    Raises:
        UserError: PEFT is not installed, or the adapter lacks weights or does not fit the base model.
    """
    require_peft(f"{adapter} is an adapter, which")
    from peft import PeftModel

    with _without_peft_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")  # of weights that would stay random
        try:
            merged: PreTrainedModel = PeftModel.from_pretrained(base, adapter).merge_and_unload()
        except (UserWarning, RuntimeError, KeyError) as error:
            problem = one_line(error) + (" is missing" if isinstance(error, KeyError) else "")
            raise UserError(f"the adapter {adapter} does not fit {base.name_or_path}: {problem}") from error
    merged.name_or_path = str(adapter)  # a further adapter is one on this one
    if Path(adapter, GENERATION_CONFIG_NAME).is_file():
        merged.generation_config = GenerationConfig.from_pretrained(adapter)
    return merged


def require_peft(what: str) -> None:
    """Raise UserError, which begins with `what` needs it, unless PEFT is installed."""
    if find_spec("peft") is None:
        raise UserError(f"{what} needs PEFT: pip install 'fgpt-hf[peft]'")
    # PEFT imports bitsandbytes where it is installed, which then warns that a kernel for inference is missing.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


@contextmanager
def _without_peft_warnings() -> Iterator[None]:
    """Silence the warnings of PEFT that a user can do nothing about."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out")  # which PEFT then sets itself
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        yield


def _adapter_config(name: str) -> Path | None:
    """Return the configuration of an adapter, in a folder or in the Hub's cache; None if `name` is none."""
    try:
        found = find_adapter_config_file(name)
    except OSError:  # no such folder or repo, which loading the model explains
        return None
    return Path(found) if found else None


def _targets(run: TuningRun) -> list[str] | str:
    """Return the targets as PEFT takes them."""
    named = [name.strip() for name in run.lora_target_modules.split(",")]
    return named if named != ["all-linear"] else "all-linear"


def _ends_in(layer: str, target: str) -> bool:
    return f".{layer}".endswith(f".{target}")
