"""Export FGPT models to the formats of other programs: a stock GPT-2, GGUF for llama.cpp, and ONNX."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase

from fgpt_hf.convert.layouts import to_gpt2
from fgpt_hf.errors import UserError
from fgpt_hf.files import atomic_directory, read_json, write_json
from fgpt_hf.model.io import load_fgpt, save_model, save_tokenizer
from fgpt_hf.model.modeling_fgpt import FGPTForCausalLM


def export(model: str, target: Path, format: str) -> None:
    """Write an FGPT model in the format of another program.

    Args:
        model: a model's or a run's folder, or an id on the Hub.
        target: a new folder, or for gguf a new file.
        format: one of `FORMATS`: gpt2, gguf or onnx.

    Raises:
        UserError: it is not an FGPT model, or the format cannot express it; `target` already exists, or its name does
            not fit the format; the format needs a package that is not installed.

    Example:
        >>> export("runs/quickstart/base", Path("gpt2"), "gpt2")  # doctest: +SKIP
        >>> export("runs/quickstart/base", Path("model.gguf"), "gguf")  # doctest: +SKIP
    """
    if format not in FORMATS:
        raise UserError(f"format={format!r} is unknown: choose from {', '.join(FORMATS)}")
    refuse_existing(target)
    FORMATS[format](*load_fgpt(model), target)


def stock_gpt2(model: FGPTForCausalLM) -> GPT2LMHeadModel:
    """Return the same network as transformers' own GPT-2, which needs no remote code.

    Example:
        >>> from fgpt_hf.model.configuration_fgpt import FGPTConfig
        >>> model = FGPTForCausalLM(FGPTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2)).eval()
        >>> ids = torch.tensor([[5, 6, 7]])
        >>> torch.allclose(stock_gpt2(model)(ids).logits, model(ids).logits, atol=1e-5)
        True
    """
    config, state = to_gpt2(model)
    with torch.device("meta"):
        gpt2 = GPT2LMHeadModel(config)
    gpt2.load_state_dict(state, assign=True)
    gpt2.tie_weights()
    gpt2.generation_config = model.generation_config
    gpt2.eval()
    return gpt2


def write_gpt2(model: FGPTForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a folder that vLLM, TGI, llama.cpp's own converter and others load as a GPT-2."""
    with atomic_directory(folder) as partial:
        save_model(stock_gpt2(model), tokenizer, partial)
        repeat_chat_template(partial)


def repeat_chat_template(folder: Path) -> None:
    """Put a folder's chat template into `tokenizer_config.json` too, where Transformers.js and TGI look for it."""
    template, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if template.is_file():
        write_json(config, {**read_json(config), "chat_template": template.read_text(encoding="utf-8")})


def write_gguf(model: FGPTForCausalLM, tokenizer: PreTrainedTokenizerBase, file: Path) -> None:
    """Write a file that llama.cpp loads, with tokenizer and chat template."""
    try:
        from fgpt_hf.convert.gguf import write_gguf_file
    except ImportError as error:
        raise _missing_package(error) from error
    write_gguf_file(stock_gpt2(model), tokenizer, file)


def write_onnx(model: FGPTForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a folder that Optimum and Transformers.js load: a float32 graph, its configs, tokenizer and template."""
    try:
        from fgpt_hf.convert.onnx import write_graph
    except ImportError as error:
        raise _missing_package(error) from error
    with atomic_directory(folder) as partial:
        write_graph(stock_gpt2(model).float(), partial)
        save_tokenizer(tokenizer, partial)
        repeat_chat_template(partial)


FORMATS: Mapping[str, Callable[[FGPTForCausalLM, PreTrainedTokenizerBase, Path], None]] = {
    "gpt2": write_gpt2,
    "gguf": write_gguf,
    "onnx": write_onnx,
}


def refuse_existing(path: Path) -> None:
    """Raise UserError if there is a file of this name, or a folder that is not empty."""
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise UserError(f"{path} already exists: choose another name, or delete it")


def _missing_package(error: ImportError) -> UserError:
    problem = " ".join(str(error).split())
    return UserError(f"a package is missing ({problem}): pip install 'fgpt-hf[export]'")
