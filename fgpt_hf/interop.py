"""Models of other programs in, and FGPT's models out to other programs."""

import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, GPT2LMHeadModel, PreTrainedTokenizerBase

from fgpt_hf.checkpoints import save_model
from fgpt_hf.configuration_fgpt import FGPTConfig
from fgpt_hf.folders import model_folder, whole_folder
from fgpt_hf.loading import load_tokenizer, load_weights
from fgpt_hf.modeling_fgpt import FGPTForCausalLM
from fgpt_hf.tokenizer import CHAT_TEMPLATE, CONTROL_TOKENS, END_OF_TEXT_ID, ORIGINAL_CHAT_TEMPLATE, build_tokenizer
from fgpt_hf.weights import Found, from_checkpoint, from_gpt2, padded, to_gpt2

GPT2_TOKENS = END_OF_TEXT_ID + 1
ALL_TOKENS = max(CONTROL_TOKENS.values()) + 1


def convert(
    source: str, folder: Path, vocab_size: int | None = None, num_attention_heads: int | None = None
) -> tuple[str, FGPTForCausalLM]:
    """Write other people's weights as a complete model folder; returns the layout they had, and the model.

    `source` is a checkpoint of the original FGPT or of nanoGPT, or a `GPT2LMHeadModel` as a folder or a name on the
    Hub. Nothing in a checkpoint is executed. A vocabulary without room for the control tokens grows to FGPT's, or to
    `vocab_size`, by tokens that are never the likeliest. `num_attention_heads` is for a checkpoint of another number
    than the original's 24 or nanoGPT's own record.

    Raises:
        ValueError: no such source, not weights, an unknown layout, an architecture that FGPT lacks, heads that do not
            divide the width, another tokenizer than GPT-2's, a vocabulary that is too small; `folder` is there already.
    """
    _refuse_existing(folder)
    found = _read(source, num_attention_heads)
    found = padded(found, _vocabulary(found.config.vocab_size, vocab_size))
    with torch.device("meta"):
        model = FGPTForCausalLM(found.config)
    model.load_state_dict(found.weights, assign=True)
    model.tie_weights()
    config = model.config
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    template = ORIGINAL_CHAT_TEMPLATE if found.layout.startswith("original") else CHAT_TEMPLATE
    with whole_folder(folder) as partial:
        save_model(model.eval(), build_tokenizer(config.max_position_embeddings, template), partial)
    return found.layout, model


def export(model: str, target: Path, format: str) -> None:
    """Write an FGPT model, a folder or a name on the Hub, in one of `FORMATS`.

    Raises:
        ValueError: it is not an FGPT model, or one that the format cannot express; `target` is there already, or is
            not a name for this format; a package that the format needs is not installed.
    """
    if format not in FORMATS:
        raise ValueError(f"format={format!r} is unknown: choose from {', '.join(FORMATS)}")
    _refuse_existing(target)
    FORMATS[format](*load(model), target)


def load(model: str) -> tuple[FGPTForCausalLM, PreTrainedTokenizerBase]:
    """An FGPT model and its tokenizer, from a folder (a run's too) or by a name on the Hub.

    Raises:
        ValueError: there is none, it is another model, or something of it is damaged.
    """
    source = str(model_folder(Path(model))) if Path(model).exists() else model
    config = _config(source)
    if config.model_type != FGPTConfig.model_type:
        raise ValueError(
            f"{model} holds a model of the type {config.model_type!r}, not {FGPTConfig.model_type!r}: `fgpt convert` "
            "makes one of a GPT-2"
        )
    return load_weights(FGPTForCausalLM, source).eval(), load_tokenizer(source)


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
    with whole_folder(folder) as partial:
        save_model(stock_gpt2(model), tokenizer, partial)


def write_gguf(model: FGPTForCausalLM, tokenizer: PreTrainedTokenizerBase, file: Path) -> None:
    """Write a file that llama.cpp loads, tokenizer and chat template included."""
    try:
        from fgpt_hf.llamacpp import write
    except ImportError as error:
        raise _missing(error) from error
    write(stock_gpt2(model), tokenizer, file)


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
    with torch.no_grad(), whole_folder(folder) as partial:
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


def _read(source: str, num_attention_heads: int | None) -> Found:
    if Path(source).is_file():
        try:
            return from_checkpoint(_load_checkpoint(Path(source)), num_attention_heads)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
    config = _config(source)
    if config.model_type != "gpt2":
        raise ValueError(f"{source} holds a model of the type {config.model_type!r}: convert takes 'gpt2' from folders")
    _check_tokenizer(source)
    model = load_weights(GPT2LMHeadModel, source, dtype="auto")
    return from_gpt2(model.config, model.state_dict())


def _load_checkpoint(file: Path) -> Mapping[str, Any]:
    """What a checkpoint holds, as long as that is tensors, numbers, text and containers of them."""
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise ValueError(
            "it is a pickle of something else than weights, or damaged, and was not executed; save the state dict "
            "alone: torch.save(model.state_dict(), 'weights.pth')"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:  # what torch raises for a damaged file
        raise ValueError(f"it cannot be read as a checkpoint of torch ({error})") from error
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"it holds a {type(checkpoint).__name__}, not weights by name")
    return checkpoint


def _config(source: str) -> Any:
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        problem = " ".join(str(error).split())
        raise ValueError(f"{source} is neither a model's folder nor a model that the Hub gives: {problem}") from error


def _check_tokenizer(source: str) -> None:
    """Refuse a model whose ids mean something else; one that comes without a tokenizer is taken for a GPT-2."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError):
        return
    vocabulary, ours = tokenizer.get_vocab(), build_tokenizer().get_vocab()
    if vocabulary.keys() <= set(tokenizer.all_special_tokens):  # what transformers gives where there are no files
        return
    differing = [token for token, index in ours.items() if index < GPT2_TOKENS and vocabulary.get(token) != index]
    if differing:
        raise ValueError(f"{source} has another tokenizer than GPT-2's: they differ in {len(differing):,} tokens")


def _vocabulary(have: int, asked: int | None) -> int:
    """How many tokens a converted model has: what was asked for, or what it has if FGPT's own fit into it."""
    if have < GPT2_TOKENS:
        raise ValueError(f"the weights have a vocabulary of {have}, too small for GPT-2's {GPT2_TOKENS} tokens")
    wanted = asked or (have if have >= ALL_TOKENS else FGPTConfig.vocab_size)
    if wanted < ALL_TOKENS:
        raise ValueError(f"vocab_size={wanted} is too small: the tokenizer has {ALL_TOKENS} tokens")
    return wanted


def _refuse_existing(path: Path) -> None:
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise ValueError(f"{path} is there already: choose another name, or delete it")


def _missing(error: ImportError) -> ValueError:
    problem = " ".join(str(error).split())
    return ValueError(f"a package is missing ({problem}): pip install 'fgpt-hf[export]'")
