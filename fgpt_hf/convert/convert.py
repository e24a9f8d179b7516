"""Models of other programs in, and FGPT's models out to other programs."""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig, GPT2LMHeadModel

from fgpt_hf.convert.export import _refuse_existing
from fgpt_hf.convert.layouts import ConvertedWeights, from_checkpoint, from_gpt2, pad_vocabulary
from fgpt_hf.errors import UserError
from fgpt_hf.files import atomic_directory
from fgpt_hf.model.configuration_fgpt import FGPTConfig
from fgpt_hf.model.io import load_config, load_weights, save_model
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


def convert(
    source: str, folder: Path, vocab_size: int | None = None, num_attention_heads: int | None = None
) -> tuple[str, FGPTForCausalLM]:
    """Write other people's weights as a complete model folder; returns the layout they had, and the model.

    `source` is a checkpoint of the original FGPT or of nanoGPT, or a `GPT2LMHeadModel` as a folder or a name on the
    Hub. Nothing in a checkpoint is executed. A vocabulary without room for the control tokens grows to FGPT's, or to
    `vocab_size`, by tokens that are never the likeliest. `num_attention_heads` is for a checkpoint of another number
    than the original's 24 or nanoGPT's own record.

    Raises:
        UserError: no such source, not weights, an unknown layout, an architecture that FGPT lacks, heads that do not
            divide the width, another tokenizer than GPT-2's, a vocabulary that is too small; `folder` is there already.
    """
    _refuse_existing(folder)
    found = _read(source, num_attention_heads)
    found = pad_vocabulary(found, _vocabulary(found.config.vocab_size, vocab_size))
    with torch.device("meta"):
        model = FGPTForCausalLM(found.config)
    model.load_state_dict(found.weights, assign=True)
    model.tie_weights()
    config = model.config
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    template = ORIGINAL_CHAT_TEMPLATE if found.layout.startswith("original") else CHAT_TEMPLATE
    with atomic_directory(folder) as partial:
        save_model(model.eval(), build_tokenizer(config.max_position_embeddings, template), partial)
    return found.layout, model


def _read(source: str, num_attention_heads: int | None) -> ConvertedWeights:
    if Path(source).is_file():
        try:
            return from_checkpoint(_load_checkpoint(Path(source)), num_attention_heads)
        except ValueError as error:
            raise UserError(f"{source}: {error}") from error
    config = load_config(source)
    if config.model_type != "gpt2":
        raise UserError(f"{source} holds a model of the type {config.model_type!r}: convert takes 'gpt2' from folders")
    _check_tokenizer(source)
    model = load_weights(GPT2LMHeadModel, source, dtype="auto")
    return from_gpt2(model.config, model.state_dict())


def _load_checkpoint(file: Path) -> Mapping[str, Any]:
    """What a checkpoint holds, as long as that is tensors, numbers, text and containers of them."""
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise UserError(
            "it is a pickle of something else than weights, or damaged, and was not executed; save the state dict "
            "alone: torch.save(model.state_dict(), 'weights.pth')"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:  # what torch raises for a damaged file
        raise UserError(f"it cannot be read as a checkpoint of torch ({error})") from error
    if not isinstance(checkpoint, Mapping):
        raise UserError(f"it holds a {type(checkpoint).__name__}, not weights by name")
    return checkpoint


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
        raise UserError(f"{source} has another tokenizer than GPT-2's: they differ in {len(differing):,} tokens")


def _vocabulary(have: int, asked: int | None) -> int:
    """How many tokens a converted model has: what was asked for, or what it has if FGPT's own fit into it."""
    if have < GPT2_TOKENS:
        raise UserError(f"the weights have a vocabulary of {have}, too small for GPT-2's {GPT2_TOKENS} tokens")
    wanted = asked or (have if have >= ALL_TOKENS else FGPTConfig.vocab_size)
    if wanted < ALL_TOKENS:
        raise UserError(f"vocab_size={wanted} is too small: the tokenizer has {ALL_TOKENS} tokens")
    return wanted
