"""`fgpt train-instruct`: teach a base model to answer, from conversations."""

import logging
from collections.abc import Sequence

from fgpt_hf.cli.stage import TrainingStage
from fgpt_hf.config.parser import parse_run
from fgpt_hf.config.presets import INSTRUCT_PRESETS
from fgpt_hf.config.runs import InstructRun
from fgpt_hf.data.conversations import describe_layouts
from fgpt_hf.data.instruct import load_instruct_data
from fgpt_hf.evaluation.benchmark import load_benchmarks
from fgpt_hf.evaluation.checks import fixed_prompts_that_fit, prompts_that_fit
from fgpt_hf.losses.objectives import LanguageModelObjective
from fgpt_hf.training.finetuning import merge_adapter
from fgpt_hf.training.outlook import Epoch
from fgpt_hf.training.start_model import open_model
from fgpt_hf.training.step_loop import Check
from fgpt_hf.wording import count_of

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str]) -> None:
    """Train the run that the command line describes."""
    # Run
    run = parse_run(InstructRun, INSTRUCT_PRESETS, arguments)
    stage = TrainingStage(run)

    with stage.opened():
        # Model
        if layouts := describe_layouts(run):
            logger.info("%s", layouts)
        model, tokenizer, context, encoder, added_tokens = open_model(run)

        # What can be refused before data is read
        stage.require_memory(model.config)
        tasks = load_benchmarks(run.task_names, tokenizer, context, run.eval_task_limit)
        prompts = fixed_prompts_that_fit(tokenizer, context, run.max_new_tokens)

        # Data
        data = load_instruct_data(run, tokenizer, context, encoder)
        logger.info("%s", data.description)
        plan = stage.plan(model.config, epoch_rows=len(data.rows))
        batches = data.batches(run.seed, stage.rank, stage.processes)

        # Checks
        prompts += prompts_that_fit(tokenizer, data.prompts, context, run.max_new_tokens)
        checks: list[Check] = [
            stage.validation_loss(model, tokenizer, data, plan),
            stage.benchmarks(model, tasks),
            stage.chat_samples(model, tokenizer, prompts),
        ]

        # Train
        objective = LanguageModelObjective(model, run.sampled_softmax)
        epoch = Epoch(len(data.rows), count_of(len(data.rows), "row of conversations"))
        trainer = stage.trainer(plan, objective, tokenizer, batches, checks, epoch)
        outcome = trainer.fit()
        merge_adapter(run, stage.folder, tokenizer)

        # Report and Hub
        stage.finish(trainer, outcome, data.provenance, added_tokens)
