"""Fine-tuning: open the model to start from, score replies under it, and merge its adapter at the end.

The reference log-probabilities of preference optimization are computed once, before training, and cached. So there is
never a second model in memory.
"""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from huggingface_hub.constants import HF_HOME
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from fgpt_hf.config.runs import TuningRun
from fgpt_hf.data.preference import TokenizedPair
from fgpt_hf.errors import UserError
from fgpt_hf.evaluation.prefix_tree import Row
from fgpt_hf.evaluation.scoring import Scorer
from fgpt_hf.files import atomic_directory, read_cached_array, write_cached_array
from fgpt_hf.model.io import load_config, load_fgpt, model_name, save_model
from fgpt_hf.model.lora import ADAPTER, add_adapter, merge_adapter_into
from fgpt_hf.model.modeling_fgpt import FGPTForCausalLM
from fgpt_hf.tokenizer.tokenizer import (
    CONTROL_TOKENS,
    END_OF_TEXT_ID,
    GENERATION_IDS,
    PAD_ID,
    ROLE_TOKENS,
    has_control_tokens,
)
from fgpt_hf.training.run_folder import RunFolder

logger = logging.getLogger(__name__)


def open_model(run: TuningRun) -> tuple[FGPTForCausalLM, PreTrainedTokenizerBase]:
    """Return the model of `run.model_name_or_path`, with an adapter if the run asks for one, and its tokenizer.

    Parameters are float32, whatever they are stored in: half precision rounds small steps away.

    Raises:
        UserError: there is no such model, it has another architecture, another vocabulary or no chat template, or its
            weights are not finite.
    """
    model, tokenizer = load_fgpt(run.model_name_or_path, torch.float32)
    stored = load_config(model_name(run.model_name_or_path)).dtype
    if stored not in (None, torch.float32):
        logger.info(
            "%s is stored in %s: it learns in float32, and so is the result",
            *(run.model_name_or_path, str(stored).removeprefix("torch.")),
        )
    if not has_control_tokens(tokenizer) or model.config.vocab_size <= PAD_ID:
        raise UserError(
            f"{run.model_name_or_path} has another vocabulary: {len(tokenizer):,} tokens, {model.config.vocab_size:,} "
            f"embeddings, without {', '.join(CONTROL_TOKENS)} at their ids. `fgpt convert` adds them to a GPT-2 that "
            "has none of its own"
        )
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(
            f"{run.model_name_or_path} has {len(tokenizer):,} tokens but {model.config.vocab_size:,} embeddings: call "
            "model.resize_token_embeddings(len(tokenizer)), and save it again"
        )
    if not tokenizer.chat_template:
        raise UserError(f"{run.model_name_or_path} has no chat template: put chat_template.jinja into its folder")
    model.generation_config = GenerationConfig(**GENERATION_IDS)
    if run.new_token_init == "mean" and (tokens := unseen_role_tokens(model, len(tokenizer))):
        start_from_mean(model, tokens)
        logger.info(
            "%s: never seen by %s, so they start from the mean of all embeddings",
            *(", ".join(tokens), run.model_name_or_path),
        )
    if run.use_peft:
        add_adapter(model, run)
        trained, total = model.num_parameters(only_trainable=True), model.num_parameters()
        logger.info(f"{trained:,} of {total:,} parameters are trained, in adapters of rank {run.lora_r}")
    return model, tokenizer


@torch.no_grad()
def unseen_role_tokens(model: PreTrainedModel, num_tokens: int = PAD_ID) -> Sequence[str]:
    """Return the role tokens that training never saw: their embeddings lie within the cluster of unused tokens.

    Each step moves the embeddings of all tokens that occur in no text in the same way, away from the states that
    predict other tokens.

    Args:
        num_tokens: the size of the tokenizer, with the tokens that a user added; embeddings behind them are unused.
    """
    rows: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]  # torch: Tensor | Module
    unused = torch.cat([rows[PAD_ID : PAD_ID + 1], rows[max(num_tokens, PAD_ID + 1) :]])
    center = unused.mean(dim=0)
    farthest = (unused - center).norm(dim=1).max()
    return [token for token in ROLE_TOKENS if (rows[CONTROL_TOKENS[token]] - center).norm() <= farthest]


@torch.no_grad()
def start_from_mean(model: FGPTForCausalLM, tokens: Sequence[str]) -> None:
    """Set the embeddings of tokens, input and output, to the mean of GPT-2's own (Hewitt 2021).

    Source: Initializing New Word Embeddings for Pretrained Language Models.
    """
    for embeddings in (model.model.embed_tokens, model.lm_head):
        for token in tokens:
            embeddings.weight[CONTROL_TOKENS[token]] = embeddings.weight[:END_OF_TEXT_ID].mean(dim=0)


def merge_adapter(run: TuningRun, folder: RunFolder, tokenizer: PreTrainedTokenizerBase) -> None:
    """Replace the adapter of a finished run by the whole model, if the run asks for that."""
    if run.use_peft and run.merge_adapter and folder.is_writer and (folder.model / ADAPTER).is_file():
        base, _ = load_fgpt(run.model_name_or_path, torch.float32)
        base.generation_config = GenerationConfig(**GENERATION_IDS)
        whole = merge_adapter_into(base, folder.model)
        with atomic_directory(folder.model) as partial:
            save_model(whole, tokenizer, partial)


def reference_log_probabilities(
    accelerator: Accelerator, model: FGPTForCausalLM, pairs: Sequence[TokenizedPair]
) -> npt.NDArray[np.float32]:
    """Return the log-probabilities of the replies, `(N, 2)`, in nats, from the cache or newly computed.

    The cache is `fgpt/reference` in `HF_HOME`. Every process must call this function.

    Raises:
        UserError: a log-probability is not a finite number.
    """
    model.to(accelerator.device)
    path = Path(HF_HOME, "fgpt", "reference", _fingerprint(accelerator, model, pairs)).with_suffix(".array")
    cached: list[npt.NDArray[np.float32] | None] = [read_cached_array(path)]
    broadcast_object_list(cached)  # the main process's, so that all take the same way
    if cached[0] is not None:
        return cached[0]
    groups = [[Row(tuple(reply.ids.tolist()), len(reply.ids) - reply.start) for reply in pair] for pair in pairs]
    scores = Scorer(accelerator, model).score(groups, "reference")
    log_probabilities = np.array([[score.log_likelihood for score in pair] for pair in scores], dtype=np.float32)
    if accelerator.is_main_process:
        write_cached_array(path, log_probabilities)
    return log_probabilities


def _fingerprint(accelerator: Accelerator, model: FGPTForCausalLM, pairs: Sequence[TokenizedPair]) -> str:
    """Return a hash of all that the log-probabilities depend on: every weight, every id, and the precision."""
    digest = hashlib.sha256(f"{model.config.to_json_string()}{accelerator.mixed_precision}".encode())
    for name, weight in model.state_dict().items():
        digest.update(name.encode())
        digest.update(weight.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    for reply in (reply for pair in pairs for reply in pair):
        digest.update(f"{len(reply.ids)} {reply.start}".encode())
        digest.update(reply.ids.tobytes())
    return digest.hexdigest()[:32]
