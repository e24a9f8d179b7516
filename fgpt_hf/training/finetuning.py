"""Fine-tuning: score replies under the starting model, and merge an adapter at the end.

The reference log-probabilities of preference optimization are computed once, before training, and cached. So there is
never a second model in memory.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from huggingface_hub.constants import HF_HOME
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fgpt_hf.config.runs import TuningRun
from fgpt_hf.data.preference import TokenizedPair
from fgpt_hf.evaluation.prefix_tree import Row
from fgpt_hf.evaluation.scoring import Scorer
from fgpt_hf.files import atomic_directory, read_cached_array, write_cached_array
from fgpt_hf.model.io import save_model
from fgpt_hf.model.lora import ADAPTER, merge_adapter_into
from fgpt_hf.runtime.distributed import from_main_process
from fgpt_hf.training.run_folder import RunFolder
from fgpt_hf.training.start_model import open_model


def merge_adapter(run: TuningRun, folder: RunFolder, tokenizer: PreTrainedTokenizerBase) -> None:
    """Replace the adapter of a finished run by the whole model, if the run asks for that."""
    if run.use_peft and run.merge_adapter and folder.is_writer and (folder.model / ADAPTER).is_file():
        base = open_model(replace(run, use_peft=False, load_in_4bit=False)).model
        whole = merge_adapter_into(base, folder.model)
        with atomic_directory(folder.model) as partial:
            save_model(whole, tokenizer, partial)


def reference_log_probabilities(
    accelerator: Accelerator, model: PreTrainedModel, pairs: Sequence[TokenizedPair]
) -> npt.NDArray[np.float32]:
    """Return the log-probabilities of the replies, `(N, 2)`, in nats, from the cache or newly computed.

    The cache is `fgpt/reference` in `HF_HOME`. Every process must call this function.

    Raises:
        UserError: a log-probability is not a finite number.
    """
    model.to(accelerator.device)
    path = Path(HF_HOME, "fgpt", "reference", _fingerprint(accelerator, model, pairs)).with_suffix(".array")
    cached: npt.NDArray[np.float32] | None = from_main_process(read_cached_array(path))
    if cached is not None:
        return cached
    groups = [[Row(tuple(reply.ids.tolist()), len(reply.ids) - reply.start) for reply in pair] for pair in pairs]
    scores = Scorer(accelerator, model).score(groups, "reference")
    log_probabilities = np.array([[score.log_likelihood for score in pair] for pair in scores], dtype=np.float32)
    if accelerator.is_main_process:
        write_cached_array(path, log_probabilities)
    return log_probabilities


def _fingerprint(accelerator: Accelerator, model: PreTrainedModel, pairs: Sequence[TokenizedPair]) -> str:
    """Return a hash of all that the log-probabilities depend on: every weight, every id, and the precision."""
    digest = hashlib.sha256(f"{model.config.to_json_string()}{accelerator.mixed_precision}".encode())
    for name, weight in model.state_dict().items():
        digest.update(name.encode())
        digest.update(weight.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    for reply in (reply for pair in pairs for reply in pair):
        digest.update(f"{len(reply.ids)} {reply.start}".encode())
        digest.update(reply.ids.tobytes())
    return digest.hexdigest()[:32]
