"""Convert checkpoints of the original FGPT, of nanoGPT and of GPT-2 to FGPT."""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, GPT2LMHeadModel

from fgpt_hf.convert.export import refuse_existing
from fgpt_hf.convert.layouts import ConvertedWeights, from_checkpoint, from_gpt2, pad_vocabulary
from fgpt_hf.errors import UserError
from fgpt_hf.files import atomic_directory
from fgpt_hf.model.configuration_fgpt import FGPTConfig
from fgpt_hf.model.io import load_config, load_tokenizer, load_weights, save_model
from fgpt_hf.model.modeling_fgpt import FGPTForCausalLM
from fgpt_hf.tokenizer.tokenizer import (
    CHAT_TEMPLATE,
    CONTROL_TOKENS,
    END_OF_TEXT_ID,
    ORIGINAL_CHAT_TEMPLATE,
    build_tokenizer,
)

GPT2_TOKENS = END_OF_TEXT_ID + 1
ALL_TOKENS = max(CONTROL_TOKENS.values()) + 1


class Conversion(NamedTuple):
    """A converted model, and the layout of the weights that it was made of."""

    layout: str
    model: FGPTForCausalLM


def convert(
    source: str, folder: Path, vocab_size: int | None = None, num_attention_heads: int | None = None
) -> Conversion:
    """Write the weights of another program as a complete FGPT model folder.

    Nothing in a checkpoint is executed.

    Args:
        source: a checkpoint of the original FGPT or of nanoGPT, or a `GPT2LMHeadModel` as a folder or an id on the Hub.
        folder: the model's new folder.
        vocab_size: number of tokens. By default, a vocabulary without room for the control tokens grows to FGPT's, and
            any other keeps its size. Added tokens are never the most likely ones.
        num_attention_heads: by default, what the source recorded, or the original's 24.

    Raises:
        UserError: there is no such source, it does not hold weights, its layout is unknown, it has a feature that FGPT
            lacks, its heads do not divide its width, its tokenizer is not GPT-2's, or its vocabulary is too small; or
            `folder` already exists.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from transformers import GPT2Config
        >>> with TemporaryDirectory() as folder:
        ...     GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2)).save_pretrained(f"{folder}/gpt2")
        ...     layout, model = convert(f"{folder}/gpt2", Path(folder, "fgpt"))
        >>> layout, model.config.vocab_size
        ('gpt2', 50304)
    """
    refuse_existing(folder)
    read = _read(source, num_attention_heads)
    layout, config, weights = pad_vocabulary(read, _vocabulary_size(read.config.vocab_size, vocab_size))
    with torch.device("meta"):
        model = FGPTForCausalLM(config)
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    model.train(False)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    template = ORIGINAL_CHAT_TEMPLATE if layout.startswith("original") else CHAT_TEMPLATE
    with atomic_directory(folder) as partial:
        save_model(model, build_tokenizer(config.max_position_embeddings, template), partial)
    return Conversion(layout, model)


def _read(source: str, num_attention_heads: int | None) -> ConvertedWeights:
    if Path(source).is_file():
        try:
            return from_checkpoint(_load_checkpoint(Path(source)), num_attention_heads)
        except UserError as error:
            raise UserError(f"{source}: {error}") from error
    config = load_config(source)
    if config.model_type != "gpt2":
        raise UserError(f"{source} holds a model of type {config.model_type!r}: convert reads folders of type 'gpt2'")
    _check_tokenizer(source)
    model = load_weights(GPT2LMHeadModel, source, dtype="auto")
    return from_gpt2(model.config, model.state_dict())


def _load_checkpoint(file: Path) -> Mapping[str, Any]:
    """Return what a checkpoint holds: tensors, numbers, text and containers of them; anything else is refused."""
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise UserError(
            "it is damaged, or a pickle of something other than weights, which was not executed; save the state dict "
            "alone: torch.save(model.state_dict(), 'weights.pth')"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:  # torch raises these for damaged files
        raise UserError(f"it cannot be read as a PyTorch checkpoint ({' '.join(str(error).split())})") from error
    if not isinstance(checkpoint, Mapping):
        raise UserError(f"it holds a {type(checkpoint).__name__}, not weights by name")
    return checkpoint


def _check_tokenizer(source: str) -> None:
    """Refuse a model whose ids have another meaning; one without a tokenizer is assumed to be a GPT-2."""
    try:
        tokenizer = load_tokenizer(source)
    except UserError:
        return
    vocabulary, ours = tokenizer.get_vocab(), build_tokenizer().get_vocab()
    if vocabulary.keys() <= set(tokenizer.all_special_tokens):  # transformers returns this if there are no files
        return
    differing = [token for token, index in ours.items() if index < GPT2_TOKENS and vocabulary.get(token) != index]
    if differing:
        raise UserError(f"{source} has another tokenizer than GPT-2's: they differ in {len(differing):,} tokens")


def _vocabulary_size(present: int, requested: int | None) -> int:
    """Return how many tokens a converted model has: as requested, or its own number if FGPT's tokens fit into it."""
    if present < GPT2_TOKENS:
        raise UserError(f"the weights have a vocabulary of {present}, too small for GPT-2's {GPT2_TOKENS} tokens")
    size = requested or (present if present >= ALL_TOKENS else FGPTConfig.vocab_size)
    if size < ALL_TOKENS:
        raise UserError(f"vocab_size={size} is too small: the tokenizer has {ALL_TOKENS} tokens")
    return size
