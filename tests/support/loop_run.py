"""A run of the training loop on invented rows, for tests that need it in processes of its own.

`python tests/support/loop_run.py --any_run_flag …`: the flags of `TinyRun`.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fgpt_hf import FGPTConfig, FGPTForCausalLM
from fgpt_hf.cli.entry_point import command_line
from fgpt_hf.config.options import option
from fgpt_hf.config.parser import parse_run
from fgpt_hf.config.runs import Run
from fgpt_hf.data.batch_fields import IGNORED
from fgpt_hf.data.batches import RowsInMemory, ShuffledRows
from fgpt_hf.evaluation.checks import ValidationLoss
from fgpt_hf.losses.objectives import LanguageModelObjective
from fgpt_hf.runtime.distributed import start_accelerator
from fgpt_hf.runtime.plan import TrainingPlan
from fgpt_hf.tokenizer.tokenizer import END_OF_TEXT_ID, PAD_ID, build_tokenizer
from fgpt_hf.training.run_folder import RunFolder
from fgpt_hf.training.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class TinyRun(Run):
    dropout: float = option(0.0, "Dropout of the residuals.", minimum=0, below=1)
    infinite_from: int = option(0, "First step whose loss is infinite, or 0.", minimum=0)
    infinite_steps: int = option(1, "Number of steps whose loss is infinite.")
    unscored: int = option(0, "Step whose labels are all ignored, or 0.", minimum=0)
    rows_that_fit: int = option(0, "Rows above which a micro-batch runs out of memory, or 0.", minimum=0)
    validation_rows: int = option(8, "Rows that the checks share among the processes, four at a time.")


TINY = TinyRun(
    preset="tiny",
    max_steps=8,
    per_device_train_batch_size=8,
    gradient_accumulation_steps=1,
    learning_rate=1e-2,
    warmup_steps=2,
    bf16=False,
    logging_steps=1,
    eval_steps=4,
    save_steps=3,
)


def ragged_rows(count: int = 40, length: int = 16) -> np.ndarray:
    """Rows of one or two documents of every length, padded: no two have equally many scored tokens."""
    random = np.random.default_rng(0)
    rows = random.integers(0, 90, (count, length)).astype(np.uint16)
    rows[:, 0] = END_OF_TEXT_ID
    for row in rows:
        row[random.integers(1, length)] = END_OF_TEXT_ID
        row[random.integers(2, length + 1) :] = PAD_ID
    return rows


class FaultyRows(ShuffledRows):
    """Rows of which those of one step are not scored."""

    unscored = 0

    def take(self, count: int) -> dict[str, torch.Tensor]:
        step = self.position // TINY.per_device_train_batch_size + 1
        batch = super().take(count)
        return batch | {"labels": torch.full_like(batch["labels"], IGNORED)} if step == self.unscored else batch


class FaultyObjective(LanguageModelObjective):
    """The loss of a language model, which some steps make infinite and large micro-batches too much for the memory."""

    infinite: range = range(0)
    rows_that_fit = 0
    step = 0

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:  # type: ignore[override]
        if 0 < self.rows_that_fit < len(batch["labels"]):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more than there is.")
        self.step += 1
        return super().forward(batch) * (float("inf") if self.step in self.infinite else 1.0)


def main(arguments: Sequence[str]) -> None:
    torch.set_num_threads(1)
    run = parse_run(TinyRun, {"tiny": TINY}, ["--preset=tiny", *arguments])
    accelerator = start_accelerator(run)
    folder = RunFolder(run, accelerator.process_index)
    with folder.opened():
        model = FGPTForCausalLM(
            FGPTConfig(
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=16,
                residual_dropout=run.dropout,
            )
        )
        objective = FaultyObjective(model)
        objective.infinite = range(run.infinite_from, run.infinite_from + run.infinite_steps)
        objective.rows_that_fit = run.rows_that_fit
        rows = FaultyRows(RowsInMemory(ragged_rows()), run.seed, accelerator.process_index, accelerator.num_processes)
        rows.unscored = run.unscored
        lengths = torch.ones(model.config.vocab_size, dtype=torch.int64)
        check = ValidationLoss(run.eval_steps, accelerator, model, ragged_rows(run.validation_rows), lengths, 4)
        rows_per_step = run.per_device_train_batch_size, run.gradient_accumulation_steps
        plan = TrainingPlan(run.max_steps, *rows_per_step, minutes=run.max_minutes)
        outcome = Trainer(
            accelerator=accelerator,
            run=run,
            plan=folder.decided(plan),
            folder=folder,
            objective=objective,
            tokenizer=build_tokenizer(),
            batches=rows,
            checks=[check],
        ).fit()
    sys.exit(outcome.exit_code)


if __name__ == "__main__":
    command_line(main)
