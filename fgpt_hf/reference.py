"""The model before training, as far as preference optimisation asks for it: how likely it found each reply.

Computed once, before there are gradients or an optimizer, and kept: so one model is in memory while it trains.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from huggingface_hub.constants import HF_HOME
from transformers import PreTrainedModel

from fgpt_hf.pair_rows import Reply
from fgpt_hf.scoring import Scorer
from fgpt_hf.trees import Row


def reference_log_probabilities(
    accelerator: Accelerator, model: PreTrainedModel, pairs: Sequence[tuple[Reply, Reply]]
) -> npt.NDArray[np.float32]:
    """The log-probabilities of the replies, `(N, 2)`, from the cache (`fgpt/reference` in `HF_HOME`) if it has them.

    Every process must call it.

    Raises:
        ValueError: a log-probability is not a finite number.
    """
    model.to(accelerator.device)  # type: ignore[arg-type]
    path = Path(HF_HOME, "fgpt", "reference", _fingerprint(accelerator, model, pairs)).with_suffix(".npy")
    (is_cached,) = broadcast_object_list([path.is_file()])
    if is_cached:
        return np.load(path)
    groups = [[Row(tuple(reply.ids.tolist()), len(reply.ids) - reply.start) for reply in pair] for pair in pairs]
    scores = Scorer(accelerator, model).score(groups, "reference")
    found = np.array([[score.log_likelihood for score in pair] for pair in scores], dtype=np.float32)
    if accelerator.is_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial.npy")
        np.save(partial, found)
        partial.replace(path)
    return found


def _fingerprint(accelerator: Accelerator, model: PreTrainedModel, pairs: Sequence[tuple[Reply, Reply]]) -> str:
    """All that the log-probabilities follow from: every weight, every id, and the precision."""
    digest = hashlib.sha256(f"{model.config.to_json_string()}{accelerator.mixed_precision}".encode())
    for name, weight in model.state_dict().items():
        digest.update(name.encode())
        digest.update(weight.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    for reply in (reply for pair in pairs for reply in pair):
        digest.update(f"{len(reply.ids)} {reply.start}".encode())
        digest.update(reply.ids.tobytes())
    return digest.hexdigest()[:32]
