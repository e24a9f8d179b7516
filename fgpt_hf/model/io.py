"""A causal language model and its tokenizer, from a folder or from the Hub."""

import errno
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from fgpt_hf.errors import UserError
from fgpt_hf.model.configuration_fgpt import FGPTConfig
from fgpt_hf.model.modeling_fgpt import FGPTForCausalLM


def load_model(
    name: str, dtype: torch.dtype | str = torch.float32, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, in evaluation mode and of this type, or as it is stored where that is "auto", and its tokenizer.

    Raises:
        UserError: there is none of that name, it is no causal language model, or something of it is damaged.
    """
    try:
        tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
        model = load_weights(AutoModelForCausalLM, name, dtype=dtype, trust_remote_code=trust_remote_code)
    except OSError as error:
        found = sorted(str(path.parent) for path in Path("runs").glob("**/model/config.json"))
        known = f" (here: {', '.join(found)})" if found else ""
        raise UserError(
            f"no model {name!r}: give a folder with a config.json and a tokenizer{known}, or the id of a model on the "
            f"Hub; {str(error).splitlines()[0]}"
        ) from error
    return model.eval(), tokenizer


def load_tokenizer(name: str, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a model.

    Raises:
        UserError: its files are damaged, or there are none.
        OSError: there is no such model.
    """
    try:
        return AutoTokenizer.from_pretrained(name, **options)
    except (ValueError, TypeError) as error:
        raise UserError(f"the tokenizer of {name} cannot be loaded: {' '.join(str(error).split())}") from error


def load_weights(kind: Any, name: str, **options: Any) -> Any:
    """The model as `kind`, a class of models or an `Auto` class, each of its weights from its files.

    transformers gives weights that are not there random numbers, and says so in a log.

    Raises:
        UserError: the files are damaged, lack weights, or do not fit the config.
        OSError: there is no such model.
    """
    try:
        model, found = kind.from_pretrained(name, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    except SafetensorError as error:
        raise UserError(f"the weights of {name} are damaged: {error}") from error
    if missing := sorted(found["missing_keys"]):
        raise UserError(f"{name} lacks {len(missing)} of its weights, such as {missing[0]}")
    if mismatched := sorted(key for key, *_ in found["mismatched_keys"]):
        raise UserError(f"{len(mismatched)} weights of {name} do not have the shape in its config: {mismatched[0]}, …")
    return model


def load_fgpt(model: str) -> tuple[FGPTForCausalLM, PreTrainedTokenizerBase]:
    """An FGPT model and its tokenizer, from a folder (a run's too) or by a name on the Hub.

    Raises:
        UserError: there is none, it is another model, or something of it is damaged.
    """
    source = str(model_folder(Path(model))) if Path(model).exists() else model
    config = load_config(source)
    if config.model_type != FGPTConfig.model_type:
        raise UserError(
            f"{model} holds a model of the type {config.model_type!r}, not {FGPTConfig.model_type!r}: `fgpt convert` "
            "makes one of a GPT-2"
        )
    return load_weights(FGPTForCausalLM, source).eval(), load_tokenizer(source)


def load_config(source: str) -> Any:
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        problem = " ".join(str(error).split())
        raise UserError(f"{source} is neither a model's folder nor a model that the Hub gives: {problem}") from error


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    weights: dict[str, Any] | None = None,
) -> None:
    """Write a complete Hub folder: weights as safetensors, configuration, code, tokenizer, template, generation config.

    Of a model with an adapter, the adapter's weights and configuration in place of the model's.

    Raises:
        OSError: it could not be written.
    """
    try:
        model.save_pretrained(folder, state_dict=weights, max_shard_size="1TB")
        tokenizer.save_pretrained(folder)
    except Exception as error:  # a full disk is a SafetensorError, or from the tokenizer a bare Exception
        raise OSError(errno.EIO, f"could not write: {error}", str(folder)) from error


def model_folder(path: Path) -> Path:
    """The folder that holds the model, or its adapter: `path` itself, or `model/` in it where `path` is a run's folder.

    Raises:
        UserError: neither holds a model.
    """
    for folder in (path, path / "model"):
        is_described = any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))
        if is_described and any(folder.glob("*.safetensors")):
            return folder
    raise UserError(f"{path} is not a model's folder: neither it nor its model/ holds config.json and *.safetensors")


def model_name(name: str) -> str:
    """The model's folder where `name` is a run's, or `name` itself: a model's folder, or its id on the Hub."""
    is_run = not Path(name, "config.json").is_file() and Path(name, "model").is_dir()
    return str(Path(name, "model")) if is_run else name
