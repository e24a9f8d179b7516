"""What a tuning run begins with, a model that fits its data, and what it leaves."""

import math
from collections.abc import Callable, Sequence

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from fgpt_hf.checkpoints import save_model
from fgpt_hf.folders import RunFolder, whole_folder
from fgpt_hf.interop import load
from fgpt_hf.lora import ADAPTER, add_adapter, merged
from fgpt_hf.modeling_fgpt import FGPTForCausalLM
from fgpt_hf.runs import TuningRun
from fgpt_hf.tokenizer import (
    CONTROL_TOKENS,
    END_OF_TEXT_ID,
    GENERATION_IDS,
    PAD_ID,
    ROLE_TOKENS,
    has_control_tokens,
)


def open_model(
    run: TuningRun, say: Callable[[str], None] = lambda line: None
) -> tuple[FGPTForCausalLM, PreTrainedTokenizerBase]:
    """The model of `run.model_name_or_path` and its tokenizer, ready to be tuned as the run says.

    Raises:
        ValueError: there is no such model, or it has another architecture, another vocabulary or no chat template.
    """
    model, tokenizer = load(run.model_name_or_path)
    if not has_control_tokens(tokenizer) or model.config.vocab_size <= PAD_ID:
        raise ValueError(
            f"{run.model_name_or_path} has another vocabulary: {len(tokenizer):,} tokens, {model.config.vocab_size:,} "
            f"embeddings, and not {', '.join(CONTROL_TOKENS)} at their places. `fgpt convert` gives them to a GPT-2"
        )
    if not tokenizer.chat_template:
        raise ValueError(f"{run.model_name_or_path} has no chat template: put chat_template.jinja into its folder")
    model.generation_config = GenerationConfig(**GENERATION_IDS)
    if run.new_token_init == "mean" and (tokens := unseen_role_tokens(model)):
        start_from_mean(model, tokens)
        say(f"{', '.join(tokens)}: never seen by {run.model_name_or_path}, they start from the mean of all embeddings")
    if run.use_peft:
        add_adapter(model, run)
        learning = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        say(f"{learning:,} of {model.num_parameters():,} parameters are trained, in adapters of rank {run.lora_r}")
    return model, tokenizer


@torch.no_grad()
def unseen_role_tokens(model: FGPTForCausalLM) -> Sequence[str]:
    """The role tokens whose embeddings are no farther from those that no text has than these are from each other.

    Whatever occurs in no text is moved by every step in the same way, away from the states that predict other tokens.
    """
    rows = model.model.embed_tokens.weight
    center = rows[PAD_ID:].mean(dim=0)
    farthest = (rows[PAD_ID:] - center).norm(dim=1).max()
    return [token for token in ROLE_TOKENS if (rows[CONTROL_TOKENS[token]] - center).norm() <= farthest]


@torch.no_grad()
def start_from_mean(model: FGPTForCausalLM, tokens: Sequence[str]) -> None:
    """Give tokens the mean embedding of GPT-2's own, in and out (Hewitt 2021, Initializing New Word Embeddings)."""
    for embeddings in (model.model.embed_tokens, model.lm_head):
        for token in tokens:
            embeddings.weight[CONTROL_TOKENS[token]] = embeddings.weight[:END_OF_TEXT_ID].mean(dim=0)


def set_length(run: TuningRun, rows: int, processes: int) -> None:
    """Let a run whose `max_steps` is open end after `num_train_epochs` passes through so many rows."""
    if run.max_steps == 0:
        run.max_steps = math.ceil(rows * run.num_train_epochs / run.rows_of_step(processes))


def merge_adapter(run: TuningRun, folder: RunFolder, tokenizer: PreTrainedTokenizerBase) -> None:
    """Replace the adapter that a finished run has left by the whole model, if the run says so."""
    if run.use_peft and run.merge_adapter and folder.is_writer and (folder.model / ADAPTER).is_file():
        base, _ = load(run.model_name_or_path)
        base.generation_config = GenerationConfig(**GENERATION_IDS)
        whole = merged(base, folder.model)
        with whole_folder(folder.model) as partial:
            save_model(whole, tokenizer, partial)
