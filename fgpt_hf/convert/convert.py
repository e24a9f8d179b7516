"""Convert checkpoints of the original FGPT, of nanoGPT and of GPT-2 to FGPT."""

import logging
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from fgpt_hf.convert.layouts import ConvertedWeights, from_checkpoint, from_gpt2, pad_vocabulary
from fgpt_hf.convert.stock import STOCK_CLASSES, from_stock, network_with
from fgpt_hf.errors import UserError, first_line, one_line
from fgpt_hf.files import atomic_directory, refuse_existing
from fgpt_hf.model.configuration_fgpt import FGPTConfig
from fgpt_hf.model.io import load_config, load_tokenizer, load_weights, save_model
from fgpt_hf.model.modeling_fgpt import FGPTForCausalLM
from fgpt_hf.tokenizer.tokenizer import (
    CHAT_TEMPLATE,
    CONTROL_TOKENS,
    END_OF_TEXT_ID,
    ORIGINAL_CHAT_TEMPLATE,
    build_tokenizer,
    has_control_tokens,
)

logger = logging.getLogger(__name__)

GPT2_TOKENS = END_OF_TEXT_ID + 1
ALL_TOKENS = max(CONTROL_TOKENS.values()) + 1
_PROBE = "Hello, world!\n\n  naïve 日本, 1234 don't"  # shows how a tokenizer splits text


class Conversion(NamedTuple):
    """A converted model, and the layout of the weights that it was made from."""

    layout: str
    model: FGPTForCausalLM


def convert(
    source: str, folder: Path, vocab_size: int | None = None, num_attention_heads: int | None = None
) -> Conversion:
    """Write the weights of another program as a complete FGPT model folder.

    Nothing in a checkpoint is executed. A GPT-2 that has its own tokens after GPT-2's, or its own chat template, keeps
    its tokenizer; each one keeps its generation config.

    Args:
        source: a checkpoint of the original FGPT or of nanoGPT, or a `GPT2LMHeadModel` as a folder or an id on the Hub.
        folder: the model's new folder.
        vocab_size: number of tokens. By default, a vocabulary without room for the control tokens grows to FGPT's, and
            any other keeps its size. Added tokens are never the most likely ones.
        num_attention_heads: by default, what the source recorded, or the original's 24.

    Raises:
        UserError: there is no such source, it does not hold weights, its layout is unknown, it has a feature that FGPT
            lacks, its heads do not divide its width, its tokenizer changes the meaning of GPT-2's ids or has tokens
            without weights, or its vocabulary is too small; or `folder` already exists.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> with TemporaryDirectory() as folder:
        ...     GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2)).save_pretrained(f"{folder}/gpt2")
        ...     layout, model = convert(f"{folder}/gpt2", Path(folder, "fgpt"))
        >>> layout, model.config.vocab_size
        ('gpt2', 50304)
    """
    refuse_existing(folder)
    found = _read(source, num_attention_heads)
    layout, config, weights = pad_vocabulary(found.network, _vocabulary_size(source, found, vocab_size))
    template = ORIGINAL_CHAT_TEMPLATE if layout.startswith("original") else CHAT_TEMPLATE
    tokenizer = found.tokenizer or build_tokenizer(config.max_position_embeddings, template)
    config.pad_token_id = tokenizer.pad_token_id
    model: FGPTForCausalLM = network_with(FGPTForCausalLM, config, weights)  # type: ignore[assignment]  # returns the base class
    model.generation_config = _generation_config(config, found.generation_config)
    with atomic_directory(folder) as partial:
        save_model(model, tokenizer, partial)
    return Conversion(layout, model)


class _Source(NamedTuple):
    """A network, and what came with it: a tokenizer with more than GPT-2's own tokens, and a generation config."""

    network: ConvertedWeights
    tokenizer: PreTrainedTokenizerBase | None = None
    generation_config: GenerationConfig | None = None


def _read(source: str, num_attention_heads: int | None) -> _Source:
    if Path(source).is_file():
        try:
            return _Source(from_checkpoint(_load_checkpoint(Path(source)), num_attention_heads))
        except UserError as error:
            raise UserError(f"{source}: {error}") from error
    config = load_config(source)
    if config.model_type not in STOCK_CLASSES:
        known = ", ".join(STOCK_CLASSES)
        raise UserError(f"{source} holds a model of type {config.model_type!r}: convert reads folders of type {known}")
    tokenizer = _own_tokenizer(source)
    model = load_weights(STOCK_CLASSES[config.model_type].network, source, dtype="auto")
    read = from_gpt2 if config.model_type == "gpt2" else from_stock
    try:
        return _Source(read(model.config, model.state_dict()), tokenizer, model.generation_config)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def _load_checkpoint(file: Path) -> Mapping[str, Any]:
    """Return what a checkpoint holds: tensors, numbers, text and containers of them; anything else is refused."""
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise UserError(
            "it is damaged, or a pickle of something other than weights, which was not executed; save the state dict "
            "alone: torch.save(model.state_dict(), 'weights.pth')"
        ) from error
    except OSError:
        raise
    except Exception as error:  # torch raises any for damaged files
        raise UserError(f"it cannot be read as a PyTorch checkpoint ({first_line(error)})") from error
    if not isinstance(checkpoint, Mapping):
        raise UserError(f"it holds a {type(checkpoint).__name__}, not weights by name")
    return checkpoint


def _own_tokenizer(source: str) -> PreTrainedTokenizerBase | None:
    """Return a model's tokenizer if it says more than GPT-2's: other tokens after them, a chat template, other ids.

    A model without a tokenizer is assumed to have GPT-2's.

    Raises:
        UserError: one of GPT-2's own ids has another meaning, or the tokenizer is damaged.
    """
    tokenizer = load_tokenizer(source)
    vocabulary, plain = tokenizer.get_vocab(), build_tokenizer()
    if vocabulary.keys() <= set(tokenizer.all_special_tokens):  # transformers returns this if there are no files
        return None
    ours = {token: index for token, index in plain.get_vocab().items() if index < GPT2_TOKENS}
    differing = [token for token, index in ours.items() if vocabulary.get(token) != index]
    if differing:
        raise UserError(f"{source} has another tokenizer than GPT-2's: they differ in {len(differing):,} tokens")
    added = sorted((token for token in vocabulary if token not in ours), key=vocabulary.__getitem__)
    if not added and not tokenizer.chat_template and tokenizer.encode(_PROBE) == plain.encode(_PROBE):
        return None
    if not has_control_tokens(tokenizer):
        shown = ", ".join([*added[:8], *(["…"] if len(added) > 8 else [])]) or "its chat template"
        logger.info("%s keeps its own tokenizer (%s): without FGPT's control tokens it cannot be tuned", source, shown)
    return tokenizer


def _vocabulary_size(source: str, found: _Source, requested: int | None) -> int:
    """Return how many tokens a converted model has: as requested, or its own number if all tokens fit into it."""
    present = found.network.config.vocab_size
    if present < GPT2_TOKENS:
        raise UserError(f"the weights have a vocabulary of {present}, too small for GPT-2's {GPT2_TOKENS} tokens")
    needed = ALL_TOKENS
    if found.tokenizer is not None:
        token, index = max(found.tokenizer.get_vocab().items(), key=lambda entry: entry[1])
        needed = index + 1
        if needed > present:
            raise UserError(
                f"{source} has no weights for {token!r}: its tokenizer's id is {index}, and the weights have {present} "
                f"tokens; add them with model.resize_token_embeddings({needed})"
            )
    size = requested or (present if present >= needed else FGPTConfig.vocab_size)
    if size < needed:
        raise UserError(f"vocab_size={size} is too small: the tokenizer has {needed} tokens")
    return size


def _generation_config(config: FGPTConfig, own: GenerationConfig | None) -> GenerationConfig:
    """Return a model's own generation config, or a new one, with the tokens of its config where it names none.

    Raises:
        UserError: its own contradicts itself, so that transformers would not write it.
    """
    generation = own or GenerationConfig()
    try:
        generation.validate(strict=True)
    except ValueError as error:
        raise UserError(f"generation_config.json cannot be kept: {one_line(error)}") from error
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(generation, name) is None:
            setattr(generation, name, getattr(config, name))
    return generation
