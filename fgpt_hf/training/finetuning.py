"""Fine-tuning: score replies under the starting model, and merge an adapter at the end.

The reference log-probabilities of preference optimization are computed once, before training, and cached. So there is
never a second model in memory. Each checkpoint holds them, for a run that goes on elsewhere.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from huggingface_hub.constants import HF_HOME
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fgpt_hf.config.runs import TuningRun
from fgpt_hf.data.preference import PairRows, TokenizedPair
from fgpt_hf.errors import UserError, first_line
from fgpt_hf.evaluation.prefix_tree import Row
from fgpt_hf.evaluation.scoring import Scorer
from fgpt_hf.files import atomic_directory, read_cached_array, write_cached_array
from fgpt_hf.model.io import save_model
from fgpt_hf.model.lora import ADAPTER, merge_adapter_into
from fgpt_hf.runtime.distributed import from_main_process
from fgpt_hf.training.run_folder import RunFolder
from fgpt_hf.training.start_model import open_model

LogProbabilities = npt.NDArray[np.float32]  # of chosen and rejected replies, `(N, 2)`, in nats
REFERENCE = "reference.npz"  # of a checkpoint


def merge_adapter(run: TuningRun, folder: RunFolder, tokenizer: PreTrainedTokenizerBase) -> None:
    """Replace the adapter of a finished run by the whole model, if the run asks for that."""
    if run.use_peft and run.merge_adapter and folder.is_writer and (folder.model / ADAPTER).is_file():
        base = open_model(replace(run, use_peft=False, load_in_4bit=False)).model
        whole = merge_adapter_into(base, folder.model)
        with atomic_directory(folder.model) as partial:
            save_model(whole, tokenizer, partial)


def reference_log_probabilities(
    accelerator: Accelerator, model: PreTrainedModel, parts: Sequence[PairRows], folder: RunFolder
) -> list[LogProbabilities]:
    """Return the log-probabilities of the replies of each part of the data under the model, before it is trained.

    A run that continues takes those of its checkpoint: another device, or another number of threads, would round new
    ones in another way. Every process must call this function.

    Raises:
        UserError: a log-probability is not a finite number.
    """
    found = from_main_process(_kept_in(folder.checkpoint) if folder.is_writer and folder.checkpoint else {})
    if new := [part for part in parts if part.fingerprint not in found]:
        scores = _log_probabilities(accelerator, model, [pair for part in new for pair in part.pairs])
        ends = np.cumsum([len(part) for part in new])[:-1]
        found |= {part.fingerprint: own for part, own in zip(new, np.split(scores, ends), strict=True)}
    return [found[part.fingerprint] for part in parts]


def reference_files(parts: Sequence[PairRows]) -> dict[str, bytes]:
    """Return the file of a checkpoint that holds the log-probabilities of the parts of the data."""
    file, arrays = BytesIO(), {part.fingerprint: part.reference for part in parts}
    np.savez(file, allow_pickle=False, **arrays)
    return {REFERENCE: file.getvalue()}


def _kept_in(checkpoint: Path) -> dict[str, LogProbabilities]:
    """Return what `reference_files` wrote into a checkpoint, by the fingerprints of the parts.

    Raises:
        UserError: the file holds something else.
    """
    path = checkpoint / REFERENCE
    if not path.is_file():
        return {}
    try:
        with np.load(path) as arrays:
            return {name: arrays[name].astype(np.float32, casting="no") for name in arrays}
    except (ValueError, TypeError, EOFError, BadZipFile) as error:
        raise UserError(f"{path} is damaged: {first_line(error)}") from error


def _log_probabilities(
    accelerator: Accelerator, model: PreTrainedModel, pairs: Sequence[TokenizedPair]
) -> LogProbabilities:
    """Return the log-probabilities of pairs from the cache, `fgpt/reference` in `HF_HOME`, or newly computed."""
    model.to(accelerator.device)
    path = Path(HF_HOME, "fgpt", "reference", _fingerprint(accelerator, model, pairs)).with_suffix(".array")
    cached: LogProbabilities | None = from_main_process(read_cached_array(path))
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
