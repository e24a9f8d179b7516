"""The state of a run: all that it needs to continue exactly, which its checkpoints hold.

A checkpoint is a model folder, which `from_pretrained` loads, with two more files: `training.pt`, which holds the
optimizers' state, the random number generators, the position in the data and the counters; and a manifest with the
hashes of all files. Preference runs add their reference log-probabilities. Several processes write their own parts: of
the weights, which become one file, and of the optimizers' state, which stays a folder of shards. Any number of
processes can resume from it.
"""

import errno
import logging
import random
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
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

from fgpt_hf.data.batches import Batches
from fgpt_hf.errors import UserError, first_line
from fgpt_hf.files import atomic_directory, write_manifest
from fgpt_hf.losses.objectives import Objective
from fgpt_hf.model.configuration_fgpt import FGPTConfig
from fgpt_hf.model.io import load_weights, save_model, stores_weights_as_named
from fgpt_hf.model.lora import has_adapter, restore_adapter
from fgpt_hf.model.shapes import NETWORK_FIELDS
from fgpt_hf.training import shards
from fgpt_hf.training.checkpoints import checkpoint_name, rotate
from fgpt_hf.training.optim import JointOptimizer

logger = logging.getLogger(__name__)

SHAPE_FIELDS = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers")  # of networks other than FGPT's


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
    """The contents of a checkpoint, as the training loop holds them.

    Attributes:
        files: by name, further ones of each checkpoint, which stay the same.
    """

    accelerator: Accelerator
    objective: Objective
    tokenizer: PreTrainedTokenizerBase
    optimizer: JointOptimizer
    batches: Batches
    progress: Progress
    files: Mapping[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Here, and not at the first save, because all processes must be there to connect.
        self._background_writer = shards.BackgroundWriter() if self.accelerator.num_processes > 1 else None

    @property
    def model(self) -> PreTrainedModel:
        return self.objective.model

    def save(self, folder: Path, keep: int) -> Future[Path]:
        """Write the checkpoint of this step, and delete all but the `keep` newest ones; every process must call it.

        A single process has written it when this returns. Several write in the background, each its own part; the last
        save must have ended before the next.

        Returns:
            The checkpoint's path, which raises OSError if it could not be written, for example for lack of space;
            earlier checkpoints are unchanged.
        """
        training, (weights, part) = self._training_state(), self._weights()
        checkpoint = folder / checkpoint_name(self.progress.step)
        if self.accelerator.num_processes > 1:
            states = get_optimizer_state_dict(self.model, self.optimizer.optimizers)
            part = part._replace(optimizer=shards.staged(shards.tensors_of(states)))

        def write(write_part: Callable[[Path], None]) -> Path:
            with atomic_directory(checkpoint) as partial:
                save_model(self.model, self.tokenizer, partial, weights)
                _save(training, partial / "training.pt")
                for name, content in self.files.items():
                    (partial / name).write_bytes(content)
                write_part(partial)
                write_manifest(partial)
            rotate(folder, keep, checkpoint)
            return checkpoint

        return self._written(part, checkpoint, write)

    def save_model(self, folder: Path) -> None:
        """Write the model and its tokenizer alone; every process must call it.

        Raises:
            OSError: the folder could not be written; all processes raise it.
        """
        weights, part = self._weights()

        def write(write_part: Callable[[Path], None]) -> Path:
            with atomic_directory(folder) as partial:
                save_model(self.model, self.tokenizer, partial, weights)
                write_part(partial)
            return folder

        self._written(part, folder, write).result()

    def _weights(self) -> tuple[dict[str, Any], shards.Part]:
        """Return the weights, each once: those that the main process writes, and this process's part of the others."""
        if self.accelerator.num_processes > 1 and stores_weights_as_named(self.model):
            weights = self._untied(get_model_state_dict(self.model))
            if shards.can_join(weights):
                return {}, shards.Part(weights=shards.staged(weights))
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = self._untied(get_model_state_dict(self.model, options=whole))
        if self.accelerator.num_processes > 1:  # they are written while training changes its own
            weights = {name: weight.clone() for name, weight in weights.items()}
        return weights, shards.Part()

    def _untied(self, weights: dict[str, Any]) -> dict[str, Any]:
        return {name: weight for name, weight in weights.items() if name not in self.model.all_tied_weights_keys}

    def _written(self, part: shards.Part, folder: Path, write: shards.Complete) -> Future[Path]:
        """Let the main process `write` a folder, and all of them their part where it calls back."""
        if self._background_writer:
            return self._background_writer.write(part, folder, write)
        written: Future[Path] = Future()
        try:
            written.set_result(write(lambda partial: None))
        except OSError as error:
            written.set_exception(error)
        return written

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
