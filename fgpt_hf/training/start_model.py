"""Open the model that a run starts from: any causal language model of transformers, with its own tokenizer."""

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

import psutil
import torch
from accelerate import PartialState
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from fgpt_hf.config.option_groups import NetworkOptions
from fgpt_hf.config.options import described_fields
from fgpt_hf.config.parser import is_given
from fgpt_hf.config.presets import PRESETS
from fgpt_hf.config.runs import BaseRun, Run, TuningRun
from fgpt_hf.errors import UserError
from fgpt_hf.model.configuration_fgpt import FGPTConfig
from fgpt_hf.model.document_isolation import keeps_documents_apart, require_causal
from fgpt_hf.model.embeddings import output_embeddings, token_embeddings
from fgpt_hf.model.io import (
    asks_for_router_loss,
    context_length,
    load_config,
    load_fgpt,
    load_model,
    model_source,
    require_finite_weights,
)
from fgpt_hf.model.lora import add_adapter
from fgpt_hf.model.quantization import four_bit_options, keep_differentiable, require_four_bit_layers
from fgpt_hf.model.shapes import shape_of
from fgpt_hf.runtime.distributed import PRECISIONS, mixed_precision
from fgpt_hf.tokenizer.chat_encoding import end_of_turn
from fgpt_hf.tokenizer.document_encoder import DocumentEncoder
from fgpt_hf.tokenizer.tokenizer import GENERATION_IDS, ROLE_TOKENS, add_role_tokens, has_role_tokens

logger = logging.getLogger(__name__)

# Of the typical distance. At a width of 256, the distances of rows that no text has differ by 4 %, and tuning for a few
# minutes moves a token to 1.5 and more.
UNSEEN_DISTANCE = 1.25
FLOAT = torch.float32.itemsize


class StartModel(NamedTuple):
    """A model to train, and what its rows of tokens follow from.

    Attributes:
        context: the tokens that it reads.
        encoder: how documents become its ids and rows.
        added_tokens: tokens that its tokenizer was given.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    context: int
    encoder: DocumentEncoder
    added_tokens: Sequence[str] = ()


def open_base_model(run: BaseRun, name: str) -> StartModel:
    """Return the model `name`, to train it further on documents.

    Raises:
        UserError: as `open_model`, or the rows of the run are longer than its context.
    """
    model, tokenizer = load_start_model(run, name)
    encoder, context = _encoder_for(name, model, tokenizer), context_length(model, tokenizer)
    if run.max_position_embeddings > context:
        raise UserError(
            f"max_position_embeddings={run.max_position_embeddings} is longer than the context of {name}: give "
            f"--max_position_embeddings {context}, or less for shorter rows"
        )
    _set_ends(model, tokenizer, encoder)
    return StartModel(model, tokenizer, context, encoder)


def open_model(run: TuningRun) -> StartModel:
    """Return the model of `run.model_name_or_path` to tune on conversations, with an adapter if the run asks for one.

    Parameters are float32, whatever they are stored in: half precision rounds small steps away. A model without a chat
    template gets the project's, and embeddings for its tokens.

    Raises:
        UserError: there is no such model, it is not a causal language model, its vocabulary does not fit its
            tokenizer, or its weights are not finite.
    """
    name = run.model_name_or_path
    model, tokenizer = load_start_model(run, name)
    added: Sequence[str] = ()
    if not tokenizer.chat_template:
        added = _add_template(run, name, model, tokenizer)
    unseen = [token for token in unseen_role_tokens(model, tokenizer) if token not in added]
    if unseen and run.new_token_init == "mean":
        start_from_mean(model, tokenizer, unseen)
        logger.info("%s: never seen by %s, so they start from the mean of all embeddings", ", ".join(unseen), name)
    encoder = _encoder_for(name, model, tokenizer)
    _set_ends(model, tokenizer, encoder)
    context = context_length(model, tokenizer)
    if run.use_peft:
        add_adapter(model, run, tokenizer)
        trained, total = model.num_parameters(only_trainable=True), model.num_parameters()
        logger.info(f"{trained:,} of {total:,} parameters are trained, in adapters of rank {run.lora_r}")
    return StartModel(model, tokenizer, context, encoder, added)


def refuse_contradictions(run: BaseRun, arguments: Sequence[str]) -> None:
    """Raise UserError for a flag on the shape of the network that is not the model's, from which the run gets it.

    Args:
        arguments: the command line. A preset's shape has no meaning with a model.
    """
    config: Any = load_config(model_source(str(run.start_model)), trust_remote_code=run.trust_remote_code)
    preset = PRESETS.get(run.preset)
    for field, _ in described_fields(NetworkOptions):
        value = getattr(run, field.name)
        if not is_given(field.name, arguments) and value == getattr(preset, field.name, value):
            continue
        found = getattr(config.get_text_config(), field.name, None)
        if value != found:
            has = f"has {field.name}={found}" if found is not None else f"is a {config.model_type}, which has none"
            raise UserError(
                f"{field.name}={value} contradicts {run.start_model}, which {has}: leave "
                f"--{field.name} out, since the network is the model's"
            )


def load_start_model(run: Run, name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a model in float32 and its tokenizer, if they can be trained.

    Raises:
        UserError: as `open_model`.
    """
    source, trusted = model_source(name), bool(getattr(run, "trust_remote_code", False))
    config = load_config(source, trust_remote_code=trusted)
    _require_trainable(name, config)
    quantized = _four_bit_options(run, name, config) if isinstance(run, TuningRun) and run.load_in_4bit else {}
    model: PreTrainedModel
    if config.model_type == FGPTConfig.model_type and not trusted and not quantized:
        model, tokenizer = load_fgpt(name, torch.float32)
    else:
        model, tokenizer = load_model(source, torch.float32, trusted, **quantized)
        if quantized:
            keep_differentiable(model)
            require_four_bit_layers(name, model)
        require_causal(name, model)
        require_finite_weights(name, model)
    if asks_for_router_loss(config):
        logger.warning(
            "%s asks for a loss that balances its experts (output_router_logits), which depends on how a batch is "
            "divided: it is left out, and the result asks for none",
            name,
        )
    if config.dtype not in (None, torch.float32):
        stored = str(config.dtype).removeprefix("torch.")
        logger.info("%s is stored in %s: it is trained and saved in float32", name, stored)
    embeddings, tokens = len(token_embeddings(model)), max(tokenizer.get_vocab().values()) + 1
    if tokens > embeddings:
        raise UserError(
            f"{name} has {tokens:,} tokens but {embeddings:,} embeddings: call "
            "model.resize_token_embeddings(len(tokenizer)), and save it again"
        )
    return model, tokenizer


def _four_bit_options(run: TuningRun, name: str, config: PreTrainedConfig) -> dict[str, Any]:
    """Return the options of 4-bit weights on this process's device, multiplied in the precision of the run.

    Raises:
        UserError: bitsandbytes does not serve the device, or there is no memory for the whole weights at the end.
    """
    needed, memory = FLOAT * sum(shape_of(config).sizes.values()), psutil.virtual_memory().total
    if run.merge_adapter and needed > memory:
        raise UserError(
            f"merging the adapters into the weights of {name} takes {needed / 1e9:,.0f} GB at the end, and this "
            f"machine has {memory / 1e9:,.0f} GB: give --merge_adapter false, which saves the adapters alone"
        )
    device = PartialState().device
    return four_bit_options(device, PRECISIONS[mixed_precision(run, device)])


def _require_trainable(name: str, config: PreTrainedConfig) -> None:
    """Raise UserError for a network that cannot learn the next token, as far as its configuration tells."""
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"{name} is a {config.model_type}, an encoder with a decoder: choose a causal language model, such as a "
            "GPT-2 or a Llama"
        )
    if getattr(config, "quantization_config", None):
        raise UserError(
            f"{name} is quantized, and quantized weights cannot be trained: start from the original, with --use_peft "
            "--load_in_4bit if that is too large"
        )


def _encoder_for(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> DocumentEncoder:
    """Return how documents become rows for a model, several in a row if it keeps them apart."""
    encoder = DocumentEncoder.of(tokenizer)
    if keeps_documents_apart(model):
        return encoder
    logger.info(
        "%s mixes the documents of a packed row, so each document gets a row of its own, with padding",
        name,
    )
    return replace(encoder, packs=False)


def _set_ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, encoder: DocumentEncoder) -> None:
    """Let generation stop where the model's own configuration says, and at the ends of texts and of turns."""
    if encoder.rules is None:
        model.generation_config = GenerationConfig(**GENERATION_IDS)
        return
    config = _saveable(model.generation_config or GenerationConfig())
    found = config.eos_token_id
    ends = [] if found is None else [found] if isinstance(found, int) else list(found)
    ends += [tokenizer.eos_token_id, end_of_turn(tokenizer)]
    config.eos_token_id = list(dict.fromkeys(end for end in ends if end is not None))
    config.pad_token_id = encoder.pad
    model.generation_config = config


def _saveable(config: GenerationConfig) -> GenerationConfig:
    """Return a generation config that can be saved: published ones may break rules that are newer than they are.

    Most often they have a temperature and do not sample; transformers' advice is to let them.
    """
    for changes in ({}, {"do_sample": True}):
        config = GenerationConfig(**{**config.to_dict(), **changes})
        with suppress(ValueError):
            config.validate(strict=True)
            return config
    logger.warning("the generation config of the model cannot be saved, so the result gets a default one")
    return GenerationConfig(bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id)


def _add_template(
    run: TuningRun, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Sequence[str]:
    """Give a tokenizer the project's chat template and its tokens, and a model embeddings for them; return those."""
    embeddings, added = len(token_embeddings(model)), add_role_tokens(tokenizer)
    grows = len(tokenizer) > embeddings
    if grows and run.use_peft and not run.merge_adapter:
        raise UserError(
            f"{name} has no chat template, and no room in its {embeddings:,} embeddings for the tokens of FGPT's. An "
            "adapter that is kept apart cannot hold these: leave merge_adapter at true"
        )
    if grows:
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64, mean_resizing=False)
        if run.use_peft:  # which would store the embeddings with the adapter if it could see that they have grown
            model.name_or_path = ""
    now = len(token_embeddings(model))
    where = f"embeddings grown from {embeddings:,} to {now:,}" if grows else "embeddings that were unused"
    logger.info("%s has no chat template: it gets FGPT's, with %s in %s", name, ", ".join(added) or "its tokens", where)
    start_from_mean(model, tokenizer, added)
    return added


@torch.no_grad()
def unseen_role_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Sequence[str]:
    """Return the role tokens that training never saw: their embeddings lie within the cluster of unused tokens.

    Each step moves the embeddings of all tokens that occur in no text in the same way, away from the states that
    predict other tokens. What is left between them is their random start, so one more of them is as far from their
    center as they typically are. The unused ones are padding and those after the tokenizer's. With fewer than
    two, and for tokenizers without role tokens, no token counts as unseen.
    """
    rows = token_embeddings(model)
    pad, tokens = tokenizer.pad_token_id, len(tokenizer)
    padding = rows[pad : pad + 1] if isinstance(pad, int) and pad != tokenizer.eos_token_id else rows[:0]
    unused = torch.cat([padding, rows[tokens:]])
    count = len(unused)
    if count < 2 or not has_role_tokens(tokenizer):
        return []
    center = unused.mean(dim=0)
    # The center is nearer to the rows that it is the mean of than to one more of their kind.
    typical = (unused - center).norm(dim=1).square().mean().sqrt() * ((count + 1) / (count - 1)) ** 0.5
    ids = tokenizer.get_vocab()
    return [token for token in ROLE_TOKENS if (rows[ids[token]] - center).norm() <= UNSEEN_DISTANCE * typical]


@torch.no_grad()
def start_from_mean(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> None:
    """Set the embeddings of tokens, input and output, to the mean of those of ordinary tokens (Hewitt 2021).

    Source: Initializing New Word Embeddings for Pretrained Language Models.
    """
    vocabulary = tokenizer.get_vocab()
    ordinary = torch.tensor(sorted(set(vocabulary.values()) - set(tokenizer.added_tokens_decoder)))
    for weight in (token_embeddings(model), output_embeddings(model)):
        if weight is not None:
            mean = weight[ordinary.to(weight.device)].mean(dim=0)
            for token in tokens:
                weight[vocabulary[token]] = mean
