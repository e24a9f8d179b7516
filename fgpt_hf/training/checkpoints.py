"""Checkpoints: all that a run needs to continue exactly.

A checkpoint is a model folder, which `from_pretrained` loads, with two more files: `training.pt`, which holds the
optimizers' state, the random number generators, the position in the data and the counters; and a manifest with the
hashes of all files. Several processes write the optimizers' state to a folder of shards instead, each its own part.
Whatever their number, any other can go on from it.
"""

import errno
import logging
import random
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain, count
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
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from fgpt_hf.config.runs import Run
from fgpt_hf.data.batches import Batches
from fgpt_hf.errors import UserError, first_line
from fgpt_hf.files import PARTIAL, atomic_directory, integrity_error, write_atomically, write_manifest
from fgpt_hf.losses.objectives import Objective
from fgpt_hf.model.configuration_fgpt import FGPTConfig
from fgpt_hf.model.io import load_weights, save_model
from fgpt_hf.model.lora import has_adapter, restore_adapter
from fgpt_hf.model.shapes import NETWORK_FIELDS
from fgpt_hf.training import shards
from fgpt_hf.training.optim import JointOptimizer

logger = logging.getLogger(__name__)

PREFIX = "step_"
SHAPE_FIELDS = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers")  # of networks other than FGPT's
ABANDONED = "abandoned"  # the folder of checkpoints that were set aside
GOING_BACK = "going_back_to"  # while checkpoints are set aside: the file with the step that the run goes back to


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
    def model(self) -> PreTrainedModel:
        return self.objective.model

    def weights(self) -> dict[str, Any]:
        """Return every weight once, on the CPU of the main process; every process must call it."""
        weights = get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        return {name: weight for name, weight in weights.items() if name not in self.model.all_tied_weights_keys}

    def save(self, folder: Path, keep: int) -> Future[Path]:
        """Write the checkpoint of this step, and delete all but the `keep` newest ones; every process must call it.

        A single process has written it when this returns. Several write in the background, each its own part of the
        optimizer's state; the last save must have ended before the next.

        Returns:
            The checkpoint's path, which raises OSError if it could not be written, for lack of space say; earlier
            checkpoints are unchanged.
        """
        weights, training = self.weights(), self._training_state()
        checkpoint = folder / checkpoint_name(self.progress.step)

        def write(extra: Callable[[Path], None] = lambda partial: None) -> Path:
            with atomic_directory(checkpoint) as partial:
                extra(partial)
                save_model(self.model, self.tokenizer, partial, weights)
                _save(training, partial / "training.pt")
                write_manifest(partial)
            rotate(folder, keep, checkpoint)
            return checkpoint

        if self.accelerator.num_processes > 1:
            weights = {name: weight.clone() for name, weight in weights.items()}  # which training goes on to change
            states = get_optimizer_state_dict(self.model, self.optimizer.optimizers)
            return self._sharded_writer.write(shards.staged(states), checkpoint, write)
        written: Future[Path] = Future()
        try:
            written.set_result(write())
        except OSError as error:
            written.set_exception(error)
        return written

    @cached_property
    def _sharded_writer(self) -> "shards.BackgroundWriter":
        return shards.BackgroundWriter()

    def _training_state(self) -> dict[str, Any]:
        """Return the contents of `training.pt`; every process must call it."""
        optimizer = None  # several processes have it in shards
        if self.accelerator.num_processes == 1:
            whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
            optimizer = get_optimizer_state_dict(self.model, self.optimizer.optimizers, options=whole)
        return {
            "optimizer": optimizer,
            "random": gather_object([_random_state()]),
            "batches": self.batches.state_dict(),
            "progress": asdict(self.progress),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
        }

    def restore(self, checkpoint: Path) -> None:
        """Take over the state that `save` wrote; every process must call it.

        Raises:
            UserError: another version of this package wrote it, it holds another network, or the data has changed.
        """
        if not has_adapter(self.model):
            require_same_network(self.model.config, checkpoint)
        training = _read_training_state(checkpoint / "training.pt")
        whole = StateDictOptions(full_state_dict=True, strict=False)  # the file holds a tied weight once
        if has_adapter(self.model):
            restore_adapter(self.model, checkpoint)
        else:
            set_model_state_dict(self.model, _stored_weights(self.model, checkpoint), options=whole)
        with self.optimizer.keeping_settings():  # those of this start, not the recorded ones
            self._restore_optimizer(checkpoint, training["optimizer"])
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

    def _restore_optimizer(self, checkpoint: Path, recorded: dict[str, Any] | None) -> None:
        """Take over the optimizer's state: as a single process recorded it, or from the shards of several."""
        if recorded is not None:
            options = StateDictOptions(full_state_dict=True, strict=False)
            set_optimizer_state_dict(self.model, self.optimizer.optimizers, recorded, options=options)
            return
        states = get_optimizer_state_dict(self.model, self.optimizer.optimizers)
        shards.read(states, checkpoint)
        options = StateDictOptions(strict=False)
        set_optimizer_state_dict(self.model, self.optimizer.optimizers, states, options=options)


def _stored_weights(model: PreTrainedModel, checkpoint: Path) -> dict[str, Any]:
    """Return the weights in a checkpoint by the model's own names, which some models store by others."""
    weights: dict[str, Any] = dict(load_file(checkpoint / "model.safetensors"))
    if model.state_dict().keys() - set(model.all_tied_weights_keys) <= weights.keys():
        return weights
    loaded: PreTrainedModel = load_weights(type(model), str(checkpoint), dtype=model.dtype)
    return loaded.state_dict()


def require_same_network(config: PreTrainedConfig, checkpoint: Path) -> None:
    """Raise UserError naming the first field in which the network of a checkpoint differs from that of a run.

    Example:
        >>> from tempfile import mkdtemp
        >>> from fgpt_hf import FGPTConfig
        >>> checkpoint = Path(mkdtemp())
        >>> FGPTConfig(norm="rmsnorm").save_pretrained(checkpoint)
        >>> require_same_network(FGPTConfig(norm="rmsnorm", residual_dropout=0.1), checkpoint)
        >>> require_same_network(FGPTConfig(), checkpoint)
        Traceback (most recent call last):
            ...
        fgpt_hf.errors.UserError: ... holds a network with norm='rmsnorm', and the run's has norm='layernorm': ...
    """
    recorded = type(config).from_pretrained(checkpoint)
    for name in NETWORK_FIELDS if isinstance(config, FGPTConfig) else SHAPE_FIELDS:
        theirs, ours = (getattr(each.get_text_config(), name, None) for each in (recorded, config))
        if theirs != ours:
            raise UserError(
                f"{checkpoint} holds a network with {name}={theirs!r}, and the run's has {name}={ours!r}: resume with "
                "the options that the run began with, or start a new one in another output_dir"
            )


def checkpoint_to_resume(run: Run, folder: Path) -> Path | None:
    """Return the checkpoint in `folder` that `run.resume_from_checkpoint` names: a path, or `latest`.

    None stands for a run that starts from its first step: one that is not to be resumed, or `latest` where no
    checkpoint was written yet.

    Raises:
        UserError: the named checkpoint is missing, damaged or another run's, or all that were written are damaged; or
            it is from a later step than the run's last one.
    """
    if run.resume_from_checkpoint is None:
        return None
    if run.resume_from_checkpoint == "latest":
        checkpoint = latest_valid_checkpoint(folder)
    else:
        checkpoint = _named_checkpoint(Path(run.resume_from_checkpoint), folder)
    if checkpoint and run.max_minutes is None and 0 < run.max_steps < step_of(checkpoint):
        raise too_few_steps(run.max_steps, step_of(checkpoint))
    return checkpoint


def _named_checkpoint(checkpoint: Path, folder: Path) -> Path:
    problem = integrity_error(checkpoint) if checkpoint.is_dir() else "there is no such folder"
    if problem is None and checkpoint.resolve() not in [path.resolve() for path in checkpoints(folder)]:
        problem = f"a run continues from a checkpoint of its own, step_… in {folder}"
    if problem:
        raise UserError(f"resume_from_checkpoint={checkpoint}: {problem}; 'latest' takes the newest complete one")
    return checkpoint


def latest_valid_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint whose files are unchanged, or None if there are no checkpoints.

    Damaged ones that are passed over are logged.

    Raises:
        UserError: all are damaged.
    """
    found = checkpoints(folder)
    for checkpoint in found:
        if (problem := integrity_error(checkpoint)) is None:
            return checkpoint
        logger.warning("skipping the damaged checkpoint %s: %s", checkpoint, problem)
    if found:
        raise UserError(f"{folder} holds no complete checkpoint to resume from: start anew with --overwrite_output_dir")
    return None


def too_few_steps(max_steps: int, step: int) -> UserError:
    """Return the error of a run that is to end before the step that it continues from."""
    return UserError(
        f"max_steps={max_steps} is below step {step}, from which the run continues: give at least {step}, or resume "
        "from an earlier checkpoint"
    )


def step_of(checkpoint: Path) -> int:
    """Return the step that a checkpoint was written after.

    Example:
        >>> step_of(Path("runs/mine/checkpoints/step_00000500"))
        500
    """
    return int(checkpoint.name.removeprefix(PREFIX))


def checkpoint_name(step: int) -> str:
    """Return the name of a checkpoint's folder.

    Example:
        >>> checkpoint_name(1000)
        'step_00001000'
    """
    return f"{PREFIX}{step:08d}"


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, newest first: damaged ones included, those that were set aside not."""
    going_back = folder / GOING_BACK
    last = int(going_back.read_text(encoding="utf-8")) if going_back.is_file() else None
    return [path for path in _all_checkpoints(folder) if last is None or step_of(path) <= last]


def set_aside_after(folder: Path, step: int) -> list[Path]:
    """Move the checkpoints of later steps to `abandoned/`, and return where they are now.

    They belong to a branch that the run leaves: `latest` must not take them, and rotation must not prefer them. If the
    process is killed meanwhile, `checkpoints` leaves out the rest, and the next call moves it.
    """
    later = [path for path in _all_checkpoints(folder) if step_of(path) > step]
    if not later:
        (folder / GOING_BACK).unlink(missing_ok=True)
        return []
    write_atomically(folder / GOING_BACK, str(step))
    (folder / ABANDONED).mkdir(exist_ok=True)
    moved = [path.rename(_unused(folder / ABANDONED / path.name)) for path in later]
    (folder / GOING_BACK).unlink()
    return moved


def _unused(path: Path) -> Path:
    """Return the path, with a number behind it if it exists."""
    numbered = (path.with_name(f"{path.name}.{number}") for number in count(2))
    return next(candidate for candidate in chain([path], numbered) if not candidate.exists())


def rotate(folder: Path, keep: int, written: Path) -> None:
    """Delete all but the `keep` newest checkpoints, and folders that a killed process left unfinished.

    The one just `written` stays in any case.
    """
    older = [path for path in checkpoints(folder) if path != written]
    for path in (*older[keep - 1 :], *folder.glob(f"*{PARTIAL}")):
        shutil.rmtree(path, ignore_errors=True)


def _all_checkpoints(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob(f"{PREFIX}*") if path.name[len(PREFIX) :].isdigit()), reverse=True)


def _read_training_state(path: Path) -> dict[str, Any]:
    """Return the contents of `training.pt`; UserError if it is no such file, or another version's; it runs no code."""
    try:
        state = torch.load(path, weights_only=True, mmap=True)
    except OSError:
        raise
    except Exception as error:  # torch raises any for what others made of a pickle
        raise UserError(
            f"{path} is damaged, or holds something else than a run's state: {first_line(error)}"
        ) from error
    if not isinstance(state, dict):
        raise UserError(f"{path} is damaged: it holds a {type(state).__name__}")
    missing = {"optimizer", "random", "batches", "progress", "scaler"} - state.keys()
    counters = state.get("progress")
    if missing or not isinstance(counters, dict) or counters.keys() != asdict(Progress()).keys():
        lacking = ", ".join(sorted(missing)) or "some of its counters"
        raise UserError(
            f"{path} was written by another version of fgpt_hf: it lacks {lacking}; resume with the version that "
            "wrote it, or start a new run from the checkpoint's model"
        )
    return dict(state)


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
