"""What the three training commands share, from the start of the processes to the finished model."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fgpt_hf.config.runs import Run, TuningRun
from fgpt_hf.data.batches import Batches
from fgpt_hf.data.instruct import InstructData
from fgpt_hf.data.pretraining import PretrainingData
from fgpt_hf.data.sources import DataProvenance
from fgpt_hf.evaluation.benchmark import Benchmark, TaskResult
from fgpt_hf.evaluation.checks import Benchmarks, ChatSamples, Prompt, Samples, ValidationLoss, bytes_of_tokens
from fgpt_hf.hub.resume import HubResume, share_state
from fgpt_hf.hub.run_record import check_records
from fgpt_hf.hub.uploader import CheckpointUploader
from fgpt_hf.losses.objectives import Objective
from fgpt_hf.model.shapes import shape_of
from fgpt_hf.report.figures import draw_figures
from fgpt_hf.report.next_steps import require_start
from fgpt_hf.report.summary import summarize_run
from fgpt_hf.runtime.attention import resolve_attn_implementation
from fgpt_hf.runtime.distributed import shared_machine, start_accelerator
from fgpt_hf.runtime.network import Network
from fgpt_hf.runtime.plan import TrainingPlan, plan_training, require_memory
from fgpt_hf.runtime.signals import exit_on_signals
from fgpt_hf.runtime.workload import Workload
from fgpt_hf.training.optim import require_known_optimizer
from fgpt_hf.training.outlook import Epoch
from fgpt_hf.training.provenance import record_provenance
from fgpt_hf.training.records import find_run
from fgpt_hf.training.run_folder import RunFolder
from fgpt_hf.training.step_loop import Check
from fgpt_hf.training.trainer import Outcome, Trainer


class TrainingStage:
    """A run with its processes, its folder and its uploads to the Hub.

    Attributes:
        accelerator: the processes, the device and the precision.
        rank: the number of this process, from 0.
        processes: the number of processes.
        machine: the devices of the run, with the memory that was free before the run took any.
        folder: where the run is written.

    Raises:
        UserError: the processes, the device or the Hub cannot do what the run asks for.
    """

    def __init__(self, run: Run) -> None:
        require_known_optimizer(run)
        self.run = run
        self.accelerator = start_accelerator(run)
        resolve_attn_implementation(run, self.accelerator, getattr(run, "dropout", 0.0))
        self.machine = shared_machine(self.accelerator)  # before it holds a model, and data
        self.rank, self.processes = self.accelerator.process_index, self.accelerator.num_processes
        self.folder = RunFolder(run, self.rank)
        self._uploader = CheckpointUploader(run, self.folder)
        self._exit_code = 0

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Reserve the run's folder, as `RunFolder.opened` does; end the trackers after a run that ended well.

        A signal ends the process, with exit code 143 or 130 unless the run is finished: the training loop saves a
        checkpoint before, and whatever else is being written is deleted.
        """
        require_start(self.run)
        if self.run.start_model and (before := find_run(Path(self.run.start_model))):
            check_records(before)  # which are read again for the card, when the run has finished
        resume = HubResume(self.run, self.folder)
        with exit_on_signals(), self.folder.opened(resume.fetch):
            share_state(resume.found, self.folder, self.accelerator)
            self._uploader.begin(resume.writer_before)
            yield
            if self._exit_code:  # with which a process exits after the others, since launchers end those that are left
                self.accelerator.wait_for_everyone()
            self.accelerator.end_training()
        if self._exit_code:
            sys.exit(self._exit_code)

    def require_memory(self, config: Network) -> None:
        """Raise UserError if the run cannot fit its devices or its time, as `runtime.plan.require_memory` does."""
        require_memory(Workload(self.run, config, self.machine))

    def plan(self, config: Network, epoch_rows: int = 0) -> TrainingPlan:
        """Decide what the run leaves open, the same on all processes, as `plan_training` does, or as it did before."""
        return plan_training(Workload(self.run, config, self.machine), epoch_rows, keep=self.folder.decided)

    def validation_loss(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        data: PretrainingData | InstructData,
        plan: TrainingPlan,
    ) -> ValidationLoss:
        """Return the check of the loss on the data's validation set."""
        bytes_of_token = bytes_of_tokens(tokenizer, shape_of(model.config).vocab_size)
        return ValidationLoss(
            self.run.eval_steps, self.accelerator, model, data.validation, bytes_of_token, plan.rows, data.collate
        )

    def benchmarks(self, model: PreTrainedModel, tasks: Sequence[Benchmark]) -> Benchmarks:
        """Return the check that runs benchmarks and writes their results into the run's folder."""

        def record(results: Sequence[TaskResult]) -> None:
            self.folder.record_results(self.accelerator, results)

        return Benchmarks(self.run.eval_task_steps, self.accelerator, model, tasks, record)

    def samples(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> Samples:
        """Return the check that continues texts, and writes the continuations into the run's folder."""
        every_steps, write = self.run.sample_steps, self.folder.append_sample
        return Samples(every_steps, self.accelerator, model, tokenizer, prompts, write, self.run.seed)

    def chat_samples(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]
    ) -> ChatSamples:
        """Return the check that answers prompts, and writes the answers into the run's folder."""
        run, write = self.run, self.folder.append_sample
        assert isinstance(run, TuningRun)  # base runs have no chats
        return ChatSamples(
            run.sample_steps, self.accelerator, model, tokenizer, prompts, write, run.seed, run.max_new_tokens
        )

    def trainer(
        self,
        plan: TrainingPlan,
        objective: Objective,
        tokenizer: PreTrainedTokenizerBase,
        batches: Batches,
        checks: Sequence[Check],
        epoch: Epoch | None,
        files: Mapping[str, bytes] | None = None,
    ) -> Trainer:
        """Return a trainer for this run that also uploads its checkpoints, if the run asks for that.

        Args:
            files: by name, further ones of each checkpoint.
        """
        return Trainer(
            accelerator=self.accelerator,
            run=self.run,
            plan=plan,
            folder=self.folder,
            objective=objective,
            tokenizer=tokenizer,
            batches=batches,
            checks=checks,
            epoch=epoch,
            files=files or {},
            on_checkpoint=self._uploader.push_checkpoint,
        )

    def finish(
        self, trainer: Trainer, outcome: Outcome, data: DataProvenance, added_tokens: Sequence[str] = ()
    ) -> None:
        """Record where the model comes from, print the report, and publish a complete model."""
        progress, self._exit_code = outcome.progress, outcome.exit_code
        config = trainer.objective.model.config
        record_provenance(self.folder, self.accelerator, data, config, progress.tokens, added_tokens)
        if self.folder.is_writer:
            draw_figures(self.folder.path)
            print(summarize_run(self.folder.path))
        self._uploader.finish(is_complete=not outcome.stopped_by)
