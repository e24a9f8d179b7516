"""Train: one loop for every stage, which knows an objective, batches and checks, but no corpus and no metric."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerBase

from fgpt_hf.config.runs import Run
from fgpt_hf.data.batches import Batches
from fgpt_hf.errors import UserError
from fgpt_hf.losses.objectives import Objective
from fgpt_hf.model.io import non_finite_weights
from fgpt_hf.runtime.attention import resolve_attn_implementation, set_attention
from fgpt_hf.runtime.distributed import all_reduce_sum, from_main_process, require_shared_disk, shard, step_timeout
from fgpt_hf.runtime.hardware import peak_memory_bytes
from fgpt_hf.runtime.plan import TrainingPlan
from fgpt_hf.runtime.signals import stop_signals
from fgpt_hf.training.checkpoints import step_of, too_few_steps
from fgpt_hf.training.optim import build_optimizer, describe_groups
from fgpt_hf.training.outlook import Epoch
from fgpt_hf.training.run_folder import RunFolder
from fgpt_hf.training.state import Progress, TrainingState
from fgpt_hf.training.step import Stepper
from fgpt_hf.training.step_loop import Check, StepLoop
from fgpt_hf.workers import exit_code_of

logger = logging.getLogger(__name__)


class Outcome(NamedTuple):
    """How far a run came, and the signal that made it stop before its last step, or 0."""

    progress: Progress
    stopped_by: int = 0

    @property
    def exit_code(self) -> int:
        """The code for the process to exit with: 0 for a finished run, 143 for one that SIGTERM stopped."""
        return exit_code_of(self.stopped_by) if self.stopped_by else 0


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """Trains the model of an objective as a run describes, and leaves it in the run's folder.

    Attributes:
        accelerator: the processes, the device and the precision.
        run: the options.
        plan: what the run left open.
        folder: where metrics, checkpoints and the model are written.
        objective: the model and its loss.
        tokenizer: saved with the model.
        batches: the training data of this process.
        checks: measurements to take along the way.
        epoch: the size of the training data, if it is known.
        files: by name, further ones of each checkpoint.
        on_checkpoint: called with the path of every checkpoint that was written.

    Example:
        >>> from tempfile import mkdtemp
        >>> import numpy as np
        >>> from fgpt_hf import FGPTConfig, FGPTForCausalLM
        >>> from fgpt_hf.data.batches import RowsInMemory, ShuffledRows
        >>> from fgpt_hf.losses.objectives import LanguageModelObjective
        >>> from fgpt_hf.tokenizer.tokenizer import build_tokenizer
        >>> run = Run(output_dir=f"{mkdtemp()}/run", bf16=False)
        >>> model = FGPTForCausalLM(FGPTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
        >>> trainer = Trainer(
        ...     accelerator=Accelerator(cpu=True),
        ...     run=run,
        ...     plan=TrainingPlan(max_steps=2, rows=4, micro_batches=1),
        ...     folder=RunFolder(run),
        ...     objective=LanguageModelObjective(model),
        ...     tokenizer=build_tokenizer(),
        ...     batches=ShuffledRows(RowsInMemory(np.full((8, 16), 5, dtype=np.uint16)), seed=0),
        ... )
        >>> trainer.fit().progress.tokens
        128
    """

    accelerator: Accelerator
    run: Run
    plan: TrainingPlan
    folder: RunFolder
    objective: Objective
    tokenizer: PreTrainedTokenizerBase
    batches: Batches
    checks: Sequence[Check] = ()
    epoch: Epoch | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)
    on_checkpoint: Callable[[Path], None] = lambda checkpoint: None

    def fit(self) -> Outcome:
        """Train up to the plan's last step and save the model; return how far the run came.

        The losses of a step are summed over micro-batches and processes and divided by their number, so the result
        does not depend on how the rows of a step are divided. SIGTERM and SIGINT let the current step end, save a
        checkpoint and return early.

        Raises:
            UserError: the processes do not share a disk, the checkpoint to resume from cannot be used, or too many
                steps in a row were unusable.
            OSError: the model could not be written.
        """
        require_shared_disk(self.folder.path, self.accelerator)
        forward, state = self._start()
        stepper = Stepper(forward, state, self.plan, self.run.max_grad_norm)
        loop = StepLoop(stepper, self.run, self.folder, self.checks, self.epoch, self.on_checkpoint)
        if self.plan.minutes is not None:
            loop.time_steps(self.plan.minutes)
        self._begin(state)
        with step_timeout(), stop_signals() as received_signal:
            stopped_by = loop.run_steps(received_signal)
        progress = state.progress
        if stopped_by:
            logger.info("stopped after step %d: the same command resumes from there", progress.step)
        else:
            state.save_model(self.folder.model)
            memory = peak_memory_bytes(self.accelerator.device) / 2**30
            logger.info("trained for %s s; peak memory %.2f GiB", f"{progress.seconds:,.0f}", memory)
        self.accelerator.wait_for_everyone()
        return Outcome(progress, stopped_by)

    def _start(self) -> tuple[nn.Module, TrainingState]:
        """Return the objective as the processes share it, and the state to start or resume from."""
        run, accelerator = self.run, self.accelerator
        model = self.objective.model.train()
        dropout = getattr(model.config, "attention_dropout", 0.0)
        set_attention(model, run, resolve_attn_implementation(run, accelerator, dropout))
        if run.gradient_checkpointing:
            model.activation_checkpointing_enable()
        if run.torch_compile:
            model.get_decoder().compile()  # in place, so that names and classes do not change
        forward = shard(self.objective, accelerator) if run.fsdp else accelerator.prepare_model(self.objective)
        if run.print_groups:
            logger.info("parameters by optimizer and weight decay:\n%s", describe_groups(model, run.optim))
        optimizer = build_optimizer(model, run)
        state = TrainingState(
            accelerator, self.objective, self.tokenizer, optimizer, self.batches, Progress(), self.files
        )
        if checkpoint := self._checkpoint():
            assert self.plan.minutes is None, "a resumed run has decided its steps: RunFolder.decided"
            if self.plan.max_steps < step_of(checkpoint):
                raise too_few_steps(self.plan.max_steps, step_of(checkpoint))
            state.restore(checkpoint)
        self._require_finite_weights(model)
        return forward, state

    def _begin(self, state: TrainingState) -> None:
        """Begin to write: the record in the run's folder, and the options for a tracker."""
        self.folder.begin(self.plan, state.progress.step if self._checkpoint() else None)
        if self.run.report_to != "none":
            options = asdict(self.plan.fill_in(self.run))
            given = {name: value for name, value in options.items() if value is not None}
            self.accelerator.init_trackers(self.run.preset, given)

    def _checkpoint(self) -> Path | None:
        """Return the checkpoint to continue from, which the main process finds."""
        return from_main_process(self.folder.checkpoint if self.folder.is_writer else None)

    def _require_finite_weights(self, model: nn.Module) -> None:
        """Raise UserError on all processes if a weight of one of them is no number: every step would be skipped."""
        broken = non_finite_weights(model)
        if any(all_reduce_sum(self.accelerator, float(len(broken)))):
            start = self.folder.checkpoint or "the model"
            example = f", such as {broken[0]}" if broken else ""
            raise UserError(f"weights of {start} hold NaN or infinite values{example}: take an earlier checkpoint")
