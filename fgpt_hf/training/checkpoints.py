"""Checkpoints: all that a run needs to continue exactly.

A checkpoint is a model folder, which `from_pretrained` loads, with two more files: `training.pt`, which holds the
optimizers' state, the random number generators, the position in the data and the counters; and a manifest with the
hashes of all files. It does not depend on the number of processes that wrote it.
"""

import errno
import logging
import random
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from transformers import PreTrainedTokenizerBase

from fgpt_hf.config.runs import Run
from fgpt_hf.data.batches import Batches
from fgpt_hf.errors import UserError
from fgpt_hf.files import PARTIAL, atomic_directory, integrity_error, write_manifest
from fgpt_hf.losses.objectives import Objective
from fgpt_hf.model.io import save_model
from fgpt_hf.model.lora import has_adapter, restore_adapter
from fgpt_hf.model.modeling_fgpt import FGPTForCausalLM
from fgpt_hf.training.optim import JointOptimizer

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        step: optimizer steps taken, skipped ones included.
        tokens: tokens read by all processes, padding included.
        seconds: time spent in training, over all the times that the run was resumed.
        skipped_steps: steps without a finite gradient or without a label.
        skipped_in_a_row: those since the last good step.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0

    @property
    def position(self) -> dict[str, float]:
        """The values that begin every line of `metrics.jsonl`."""
        return {"step": self.step, "tokens": self.tokens, "seconds": round(self.seconds, 3)}


@dataclass
class TrainingState:
    """The contents of a checkpoint, as the training loop holds them."""

    accelerator: Accelerator
    objective: Objective
    tokenizer: PreTrainedTokenizerBase
    optimizer: JointOptimizer
    batches: Batches
    progress: Progress

    @property
    def model(self) -> FGPTForCausalLM:
        return self.objective.model

    def weights(self) -> dict[str, Any]:
        """Return every weight once, on the CPU of the main process; every process must call it."""
        weights = get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        return {name: weight for name, weight in weights.items() if name not in self.model.all_tied_weights_keys}

    def save(self, folder: Path, keep: int) -> Path:
        """Write the checkpoint of this step, delete all but the `keep` newest ones, and return its path.

        Every process must call it.

        Raises:
            OSError: it could not be written, for lack of space say; earlier checkpoints are unchanged.
        """
        weights, training = self.weights(), self._training_state()
        checkpoint = folder / f"step_{self.progress.step:08d}"
        try:
            if self.accelerator.is_main_process:
                with atomic_directory(checkpoint) as partial:
                    save_model(self.model, self.tokenizer, partial, weights)
                    _save(training, partial / "training.pt")
                    write_manifest(partial)
                rotate(folder, keep)
        finally:
            self.accelerator.wait_for_everyone()
        return checkpoint

    def _training_state(self) -> dict[str, Any]:
        """Return the contents of `training.pt`; every process must call it."""
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return {
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer.optimizers, options=whole),
            "random": gather_object([_random_state()]),
            "batches": self.batches.state_dict(),
            "progress": asdict(self.progress),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
        }

    def restore(self, checkpoint: Path) -> None:
        """Take over the state that `save` wrote; every process must call it."""
        training = torch.load(checkpoint / "training.pt", weights_only=True, mmap=True)
        whole = StateDictOptions(full_state_dict=True, strict=False)  # the file holds a tied weight once
        if has_adapter(self.model):
            restore_adapter(self.model, checkpoint)
        else:
            set_model_state_dict(self.model, dict(load_file(checkpoint / "model.safetensors")), options=whole)
        set_optimizer_state_dict(self.model, self.optimizer.optimizers, training["optimizer"], options=whole)
        self.batches.load_state_dict(training["batches"])
        self.progress = Progress(**training["progress"])
        if self.accelerator.scaler and training["scaler"]:
            self.accelerator.scaler.load_state_dict(training["scaler"])
        states, processes = training["random"], self.accelerator.num_processes
        if len(states) == processes:
            _set_random_state(states[self.accelerator.process_index])
        else:
            logger.warning(
                "%s was written by %d processes and continues on %d: the rows are the same, dropout is not",
                *(checkpoint, len(states), processes),
            )


def checkpoint_to_resume(run: Run, folder: Path) -> Path:
    """Return the checkpoint that `run.resume_from_checkpoint` names: a path, or `latest`.

    Raises:
        UserError: there is no complete checkpoint, or the named one is damaged.
    """
    if run.resume_from_checkpoint == "latest":
        return latest_valid_checkpoint(folder)
    checkpoint = Path(str(run.resume_from_checkpoint))
    if problem := integrity_error(checkpoint):
        raise UserError(f"resume_from_checkpoint={checkpoint}: {problem}; 'latest' takes the newest complete one")
    return checkpoint


def latest_valid_checkpoint(folder: Path) -> Path:
    """Return the newest checkpoint whose files are unchanged; log the damaged ones that are passed over.

    Raises:
        UserError: there is none.
    """
    for checkpoint in checkpoints(folder):
        if (problem := integrity_error(checkpoint)) is None:
            return checkpoint
        logger.warning("skipping the damaged checkpoint %s: %s", checkpoint, problem)
    raise UserError(f"{folder} holds no complete checkpoint to resume from: start anew with --overwrite_output_dir")


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, newest first, damaged ones included."""
    return sorted((path for path in folder.glob("step_*") if path.name[5:].isdigit()), reverse=True)


def rotate(folder: Path, keep: int) -> None:
    """Delete all but the `keep` newest checkpoints, and folders that a killed process left unfinished."""
    for path in (*checkpoints(folder)[keep:], *folder.glob(f"*{PARTIAL}")):
        shutil.rmtree(path, ignore_errors=True)


def _save(value: Any, path: Path) -> None:
    try:
        torch.save(value, path)
    except RuntimeError as error:  # what torch raises when the disk is full
        raise OSError(errno.EIO, f"could not write: {error}", str(path)) from error


def _random_state() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if state["device"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["device"])
