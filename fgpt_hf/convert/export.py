"""Export FGPT models: as stock classes of transformers, as GGUF for llama.cpp, and as ONNX."""

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fgpt_hf.convert.stock import AUTO, STOCK_CLASSES, to_stock
from fgpt_hf.errors import UserError, one_line
from fgpt_hf.files import atomic_directory, read_json, refuse_existing, write_json
from fgpt_hf.model.configuration_fgpt import FGPTConfig
from fgpt_hf.model.io import load_config, load_fgpt, load_model, model_source, save_model, save_tokenizer
from fgpt_hf.model.modeling_fgpt import FGPTForCausalLM

GGUF, ONNX = "gguf", "onnx"
DEFAULT_TYPE = "F32"  # of the weights in a GGUF file


def export(model: str, target: Path, format: str, outtype: str | None = None) -> str:
    """Write an FGPT model in the format of another program, or one of those that it can become as gguf or onnx.

    Args:
        model: a model's or a run's folder, or an id on the Hub.
        target: a new folder, or for gguf a new file.
        format: one of `FORMATS`: a stock class of transformers (auto chooses the one that computes the same), gguf or
            onnx.
        outtype: for gguf, the type of the weights: F32 (the default), F16, BF16, Q8_0 or Q4_0.

    Returns:
        What was written: the name of the class, and for gguf the type of the weights.

    Raises:
        UserError: it is not an FGPT model, or the format cannot express it; `target` already exists, or its name does
            not fit the format; the format needs a package that is not installed.

    Example:
        >>> export("runs/quickstart/base", Path("stock"), "auto")  # doctest: +SKIP
        'GPT2LMHeadModel'
        >>> export("runs/quickstart/base", Path("model.gguf"), "gguf", "Q8_0")  # doctest: +SKIP
        'GPT2LMHeadModel, Q8_0'
    """
    if format not in FORMATS:
        raise UserError(f"format={format!r} is unknown: choose from {', '.join(FORMATS)}")
    if outtype is not None and format != GGUF:
        raise UserError(f"outtype={outtype!r} needs format='{GGUF}'")
    refuse_existing(target)
    source = model_source(model)
    if (found := load_config(source).model_type) != FGPTConfig.model_type:
        return _export_stock(source, found, target, format, outtype)
    network, tokenizer = load_fgpt(model)
    if format == GGUF:
        return write_gguf(network, tokenizer, target, outtype or DEFAULT_TYPE)
    return FORMATS[format](network, tokenizer, target)


def _export_stock(model: str, model_type: str, target: Path, format: str, outtype: str | None) -> str:
    """Write a model that is one of transformers' own classes."""
    if model_type not in STOCK_CLASSES:
        raise UserError(
            f"{model} is a {model_type}, and FGPT models, {', '.join(STOCK_CLASSES)} are exported: transformers, vLLM "
            "and others load its folder as it is"
        )
    if format not in (GGUF, ONNX):
        raise UserError(
            f"{model} is a {model_type} already, which transformers, vLLM and others load as it is: export it as "
            f"{GGUF} or {ONNX}, or not at all"
        )
    network, tokenizer = load_model(model, dtype="auto")
    if format == ONNX:
        return write_onnx(network, tokenizer, target)
    written = _gguf_writer().write_gguf_file(network, tokenizer, target, outtype or DEFAULT_TYPE)
    return f"{type(network).__name__}, {written}"


def write_stock(model: FGPTForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path, name: str = AUTO) -> str:
    """Write a folder that transformers, vLLM, TGI, llama.cpp's own converter and others load; return its class."""
    network = to_stock(model, name)
    with atomic_directory(folder) as partial_folder:
        save_model(network, tokenizer, partial_folder)
        repeat_chat_template(partial_folder)
    return type(network).__name__


def repeat_chat_template(folder: Path) -> None:
    """Put a folder's chat template into `tokenizer_config.json` too, where Transformers.js and TGI look for it."""
    template, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if template.is_file():
        write_json(config, {**read_json(config), "chat_template": template.read_text(encoding="utf-8")})


def write_gguf(
    model: FGPTForCausalLM, tokenizer: PreTrainedTokenizerBase, file: Path, outtype: str = DEFAULT_TYPE
) -> str:
    """Write a file that llama.cpp loads, with tokenizer and chat template; return its class and type."""
    writer = _gguf_writer()
    network = to_stock(model)
    return f"{type(network).__name__}, {writer.write_gguf_file(network, tokenizer, file, outtype)}"


def write_gguf_named(
    network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, name: str, outtype: str
) -> Path:
    """Write a stock network as `NAME-TYPE.gguf`, the form from which the Hub and Ollama read the type; return its path.

    Raises:
        UserError: as `export`.
    """
    writer = _gguf_writer()
    file = folder / f"{name}-{writer.possible_type(network, outtype)}.gguf"
    writer.write_gguf_file(network, tokenizer, file, file.stem.rpartition("-")[2])
    return file


def write_onnx(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, int8: bool = False) -> str:
    """Write a folder that Optimum and Transformers.js load, with weights in float32 or int8; return its class.

    Args:
        model: a network of FGPT, or one of a class of transformers.
        tokenizer: its tokenizer.
        folder: the folder to make.
        int8: whether to round the weights, to a quarter of the bytes.
    """
    try:
        from fgpt_hf.convert.onnx import write_graph
    except ImportError as error:
        raise _missing_package(error) from error
    network = (to_stock(model) if isinstance(model, FGPTForCausalLM) else model).float()
    with atomic_directory(folder) as partial_folder:
        write_graph(network, partial_folder, int8)
        save_tokenizer(tokenizer, partial_folder)
        repeat_chat_template(partial_folder)
    return type(network).__name__


FORMATS: Mapping[str, Callable[[FGPTForCausalLM, PreTrainedTokenizerBase, Path], str]] = {
    **{name: partial(write_stock, name=name) for name in (AUTO, *STOCK_CLASSES)},
    GGUF: write_gguf,
    ONNX: write_onnx,
}


def _gguf_writer() -> ModuleType:
    try:
        return import_module("fgpt_hf.convert.gguf")
    except ImportError as error:
        raise _missing_package(error) from error


def _missing_package(error: ImportError) -> UserError:
    return UserError(f"a package is missing ({one_line(error)}): pip install 'fgpt-hf[export]'")
