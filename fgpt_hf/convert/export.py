"""Models of other programs in, and FGPT's models out to other programs."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase

from fgpt_hf.convert.layouts import to_gpt2
from fgpt_hf.errors import UserError
from fgpt_hf.files import atomic_directory
from fgpt_hf.model.io import load_fgpt, save_model
from fgpt_hf.model.modeling_fgpt import FGPTForCausalLM


def export(model: str, target: Path, format: str) -> None:
    """Write an FGPT model, a folder or a name on the Hub, in one of `FORMATS`.

    Raises:
        UserError: it is not an FGPT model, or one that the format cannot express; `target` is there already, or is
            not a name for this format; a package that the format needs is not installed.
    """
    if format not in FORMATS:
        raise UserError(f"format={format!r} is unknown: choose from {', '.join(FORMATS)}")
    _refuse_existing(target)
    FORMATS[format](*load_fgpt(model), target)


def stock_gpt2(model: FGPTForCausalLM) -> GPT2LMHeadModel:
    """The same network as transformers' own GPT-2, which needs no remote code."""
    config, state = to_gpt2(model)
    with torch.device("meta"):
        gpt2 = GPT2LMHeadModel(config)
    gpt2.load_state_dict(state, assign=True)
    gpt2.tie_weights()
    gpt2.generation_config = model.generation_config
    return gpt2.eval()


def write_gpt2(model: FGPTForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a folder that vLLM, TGI, llama.cpp's own converter and the like take for a GPT-2."""
    with atomic_directory(folder) as partial:
        save_model(stock_gpt2(model), tokenizer, partial)


def write_gguf(model: FGPTForCausalLM, tokenizer: PreTrainedTokenizerBase, file: Path) -> None:
    """Write a file that llama.cpp loads, tokenizer and chat template included."""
    try:
        from fgpt_hf.convert.gguf import write_gguf_file
    except ImportError as error:
        raise _missing(error) from error
    write_gguf_file(stock_gpt2(model), tokenizer, file)


def write_onnx(model: FGPTForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a folder with a float32 graph whose batch, length and cache have any size, for ONNX Runtime.

    Inputs: `input_ids` (B, T), `attention_mask` (B, S) and a cache of S - T tokens, which may be empty. Outputs:
    `logits` (B, T, V) and the longer cache. `transformers.exporters` names them, and loads the folder again.
    """
    try:
        from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

        exporter = OnnxExporter()
    except ImportError as error:
        raise _missing(error) from error
    network = stock_gpt2(model).float()
    with torch.no_grad(), atomic_directory(folder) as partial:
        ids = torch.zeros(2, 5, dtype=torch.int64)
        cache = network(ids[:, :2], use_cache=True).past_key_values
        inputs = {"input_ids": ids[:, 2:], "attention_mask": torch.ones_like(ids), "past_key_values": cache}
        exporter.export(network, inputs, OnnxConfig(dynamic=True)).save_pretrained(partial)
        tokenizer.save_pretrained(partial)


FORMATS: Mapping[str, Callable[[FGPTForCausalLM, PreTrainedTokenizerBase, Path], None]] = {
    "gpt2": write_gpt2,
    "gguf": write_gguf,
    "onnx": write_onnx,
}


def _refuse_existing(path: Path) -> None:
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise UserError(f"{path} is there already: choose another name, or delete it")


def _missing(error: ImportError) -> UserError:
    problem = " ".join(str(error).split())
    return UserError(f"a package is missing ({problem}): pip install 'fgpt-hf[export]'")
