"""Load and save causal language models with their tokenizers, in folders or from the Hub."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import GatedRepoError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from fgpt_hf.config.runs import DEFAULT_CONTEXT
from fgpt_hf.errors import UserError, first_line, one_line
from fgpt_hf.files import apply_umask, read_json
from fgpt_hf.model.configuration_fgpt import FGPTConfig
from fgpt_hf.model.folder_checks import check_config_file, check_size
from fgpt_hf.model.lora import adapters_below, has_adapter, merge_adapter_into
from fgpt_hf.model.modeling_fgpt import FGPTForCausalLM
from fgpt_hf.model.own_code import causal_model_class
from fgpt_hf.tokenizer.chat_template import require_bounded_template

LOADING_OPTIONS = (
    "is_local",
    "local_files_only",
    "trust_remote_code",
    "_commit_hash",
    "revision",
    "token",
    "cache_dir",
)


def load_model(
    name: str, dtype: torch.dtype | str = torch.float32, trust_remote_code: bool = False, **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load any causal language model, in evaluation mode, and its tokenizer.

    Args:
        name: a model's folder, or its id on the Hub.
        dtype: type of the weights, or "auto" for the stored one.
        trust_remote_code: run the code that comes with a model on the Hub.
        options: further ones of `from_pretrained`.

    Raises:
        UserError: there is no such model, it is not a causal language model, or one of its files is damaged.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from fgpt_hf.tokenizer.tokenizer import build_tokenizer
        >>> model = FGPTForCausalLM(FGPTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
        >>> with TemporaryDirectory() as folder:
        ...     save_model(model, build_tokenizer(), Path(folder))
        ...     loaded, tokenizer = load_model(folder)
        >>> type(loaded).__name__, tokenizer.decode(tokenizer.encode("Hello"))
        ('FGPTForCausalLM', 'Hello')
    """
    tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
    base, *_ = adapters_below(name)
    config = load_config(name, trust_remote_code=trust_remote_code)
    with _user_errors(_label(base, name), "code"):
        kind = causal_model_class(base, config, trust_remote_code)
    model: PreTrainedModel = load_weights(kind, name, dtype=dtype, trust_remote_code=trust_remote_code, **options)
    if asks_for_router_loss(model.config):  # with which transformers cannot generate
        model.config.output_router_logits = False
    return model.eval(), tokenizer


def asks_for_router_loss(config: PreTrainedConfig) -> bool:
    """Return whether a mixture of experts is to add a loss for the balance of its experts, by its configuration."""
    return bool(getattr(config, "output_router_logits", False))


def load_fgpt(name: str, dtype: torch.dtype | str = "auto") -> tuple[FGPTForCausalLM, PreTrainedTokenizerBase]:
    """Load an FGPT model, in evaluation mode, and its tokenizer.

    Args:
        name: a model's or a run's folder, or a model's id on the Hub.
        dtype: type of the weights, or "auto" for the stored one.

    Raises:
        UserError: there is no such model, it is of another type, or one of its files is damaged.
    """
    source = model_source(name)
    config = load_config(source)
    if config.model_type != FGPTConfig.model_type:
        raise UserError(
            f"{name} holds a model of type {config.model_type!r}, not {FGPTConfig.model_type!r}: convert a GPT-2 with "
            "`fgpt convert`"
        )
    model: FGPTForCausalLM = load_weights(FGPTForCausalLM, source, dtype=dtype)
    require_finite_weights(name, model)
    return model.eval(), load_tokenizer(source)


def require_finite_weights(name: str, model: nn.Module) -> None:
    """Raise UserError if a parameter of the model called `name` holds NaN or infinite values."""
    if broken := non_finite_weights(model):
        raise UserError(
            f"{len(broken)} weights of {name} hold NaN or infinite values, such as {broken[0]}: take a model from "
            "before it broke, such as an earlier checkpoint"
        )


def non_finite_weights(model: nn.Module) -> list[str]:
    """Return the names of parameters with NaN or infinite values; of sharded ones, in this process's part.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> _ = nn.init.constant_(layer.bias, float("nan"))
        >>> non_finite_weights(layer)
        ['bias']
    """
    parts = (
        (name, getattr(weight, "to_local", lambda weight=weight: weight)()) for name, weight in model.named_parameters()
    )
    return [name for name, part in parts if not part.detach().isfinite().all()]


def load_config(name: str, *, trust_remote_code: bool = False, **options: Any) -> PreTrainedConfig:
    """Load a model's configuration; of an adapter, that of its base model.

    Raises:
        UserError: there is no such model, or its configuration cannot be read.
    """
    base, *_ = adapters_below(name)
    with _user_errors(_label(base, name), "configuration"):
        check_config_file(base)
        config: PreTrainedConfig = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code, **options)
    return config


def load_tokenizer(name: str, *, trust_remote_code: bool = False, **options: Any) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer.

    Raises:
        UserError: there is no such model, its tokenizer's files are missing or damaged, or its template never ends.
    """
    with _user_errors(name, "tokenizer"):
        with suppress(OSError):  # without a configuration, the tokenizer's own files may do
            check_config_file(name)
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            name, trust_remote_code=trust_remote_code, **options
        )
        require_bounded_template(name, tokenizer)
        longest = tokenizer.model_max_length
        if not isinstance(longest, (int, float)) or not longest > 0:
            raise UserError(
                f"the tokenizer of {name} is damaged: model_max_length={str(longest)[:40]!r} is not a length"
            )
    return tokenizer


def load_weights(kind: Any, name: str, **options: Any) -> Any:
    """Load a model as `kind`, a class of models or an `Auto` class, with every weight from its files.

    An adapter is merged into its base model. transformers would initialize missing weights at random and only log it.

    Raises:
        UserError: there is no such model, it is not of that kind, or its files are damaged, lack weights, or do not
            match the configuration.
    """
    base, *adapters = adapters_below(name)
    with _user_errors(_label(base, name), "weights"):
        _check_folder(kind, base, **options)
        with _without_progress_bars() if Path(base).is_dir() else nullcontext():  # a download shows its own
            model, found = kind.from_pretrained(base, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    if missing := sorted(found["missing_keys"]):
        raise UserError(f"{base} lacks {len(missing)} of its weights, such as {missing[0]}")
    if mismatched := sorted(key for key, *_ in found["mismatched_keys"]):
        raise UserError(f"{len(mismatched)} weights of {base} do not have the shape in its config: {mismatched[0]}, …")
    for adapter in adapters:
        with _user_errors(adapter, "adapter"):
            model = merge_adapter_into(model, adapter)
    return model


def _check_folder(kind: Any, name: str, dtype: Any = None, trust_remote_code: bool = False, **options: Any) -> None:
    """Refuse a network too large for its files or this machine, unless its code comes with it, and damaged settings."""
    if (generation := Path(name, "generation_config.json")).is_file():
        read_json(generation)  # transformers would do without a damaged one, and without the tokens that end a reply
    if Path(name).is_dir() and not Path(name, "config.json").is_file():
        return
    config = load_config(name, trust_remote_code=trust_remote_code)
    if all(thing.__module__.partition(".")[0] in ("transformers", "fgpt_hf") for thing in (type(config), kind)):
        with torch.device("meta"):
            network = kind.from_config(config) if hasattr(kind, "from_config") else kind(config)
        is_whole = isinstance(dtype, torch.dtype) and "quantization_config" not in options
        check_size(name, network, dtype.itemsize if is_whole else 1)


def _label(base: str, name: str) -> str:
    return base if base == name else f"{base} (the base model of the adapter {name})"


@contextmanager
def _user_errors(name: str, part: str) -> Iterator[None]:
    """Turn what transformers raises for missing or unusable files into a UserError.

    A folder that others wrote can break transformers anywhere, so any exception is one about that folder.
    """
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        if isinstance(error.__cause__, GatedRepoError):
            raise UserError(
                f"{name} is gated: accept its terms at https://huggingface.co/{name}, then log in with `hf auth login`"
            ) from error
        raise _no_model(name, first_line(error)) from error
    except SafetensorError as error:
        raise UserError(f"the weights of {name} are damaged: {error}") from error
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{name} comes with code of its own, which transformers does not have: read it, and if you trust it, "
                "give --trust_remote_code"
            ) from error
        raise UserError(f"the {part} of {name} cannot be loaded: {one_line(error)}") from error


def context_length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many tokens the model reads, as its configuration or else its tokenizer says, or else 2048.

    Example:
        >>> from fgpt_hf.tokenizer.tokenizer import build_tokenizer
        >>> config = FGPTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64)
        >>> context_length(FGPTForCausalLM(config), build_tokenizer())
        64
    """
    length = getattr(model.config.get_text_config(), "max_position_embeddings", None) or tokenizer.model_max_length
    return int(length) if length < 10**9 else DEFAULT_CONTEXT  # a tokenizer without a limit says 10**30


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    weights: dict[str, Any] | None = None,
) -> None:
    """Write a complete Hub folder: safetensors weights, configurations, code, tokenizer and chat template.

    A model with an adapter writes the adapter's weights and configuration instead of its own.

    Args:
        weights: by name, what to write instead of the model's own state, such as gathered shards.

    Raises:
        OSError: the folder could not be written.
    """
    try:
        with _without_progress_bars():
            model.save_pretrained(folder, state_dict=weights, max_shard_size="1TB")
        save_tokenizer(tokenizer, folder)
        apply_umask(folder)  # safetensors' files can be read by their owner alone
    except Exception as error:  # a full disk is a SafetensorError, or from the tokenizer a bare Exception
        raise OSError(errno.EIO, f"could not write: {error}", str(folder)) from error


def stores_weights_as_named(model: PreTrainedModel) -> bool:
    """Return whether `save_model` writes the weights by the names that they have in the model, as its only files.

    It does not for an adapter, and for networks whose files are from before transformers' own form of them.

    Example:
        >>> config = FGPTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
        >>> stores_weights_as_named(FGPTForCausalLM(config))
        True
    """
    weights = {name: weight.to("meta") for name, weight in model.state_dict().items()}
    return not has_adapter(model) and revert_weight_conversion(model, weights).keys() == weights.keys()


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Switch off transformers' progress bars while it reads or writes: they would break those of a training run."""
    was_enabled = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            enable_progress_bar()


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer's files, without the traces of how it was loaded and used.

    A call with `padding` or `truncation` leaves it switched on, and loading adds its options to the tokenizer's.
    """
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        tokenizer.backend_tokenizer.no_padding()  # each call that needs it sets it again
        tokenizer.backend_tokenizer.no_truncation()
    for name in LOADING_OPTIONS:
        tokenizer.init_kwargs.pop(name, None)
    tokenizer.save_pretrained(folder)


def model_folder(path: Path) -> Path:
    """Return the folder of a model or adapter: `path` itself, or `path/model` where `path` is a run's folder.

    Raises:
        UserError: neither holds a model.
    """
    for folder in (path, path / "model"):
        is_described = any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))
        if is_described and any(folder.glob("*.safetensors")):
            return folder
    raise _no_model(str(path), "neither the folder nor its model/ holds config.json and *.safetensors")


def model_source(name: str) -> str:
    """Return the folder of a model where `name` is that or a run's folder, else `name`, its id on the Hub.

    Raises:
        UserError: the folder holds no model.
    """
    return str(model_folder(Path(name))) if Path(name).exists() else name


def model_name(name: str) -> str:
    """Return a run's model folder where `name` is a run's folder, else `name`: a model's folder or its Hub id."""
    is_run = not Path(name, "config.json").is_file() and Path(name, "model").is_dir()
    return str(Path(name, "model")) if is_run else name


def _no_model(name: str, reason: str) -> UserError:
    """Return the one error for a name that leads to no model, with the models of the runs in this folder."""
    found = sorted(str(path.parent) for path in Path("runs").glob("**/model/config.json"))
    here = f" (here: {', '.join(found)})" if found else ""
    return UserError(
        f"no model {name!r}: give a folder with config.json and *.safetensors, a run's folder{here}, or the id of a "
        f"model on the Hub; {reason}"
    )
