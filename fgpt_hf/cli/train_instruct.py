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
from fgpt_hf.evaluation.checks import (
    Benchmarks,
    ChatSamples,
    ValidationLoss,
    bytes_of_tokens,
    fixed_prompts_that_fit,
    prompts_that_fit,
)
from fgpt_hf.losses.objectives import LanguageModelObjective
from fgpt_hf.model.shapes import shape_of
from fgpt_hf.training.finetuning import merge_adapter
from fgpt_hf.training.outlook import Epoch
from fgpt_hf.training.start_model import open_model
from fgpt_hf.wording import count_of

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str]) -> None:
    """Train the run that the command line describes."""
    # Run
    run = parse_run(InstructRun, INSTRUCT_PRESETS, arguments)
    stage = TrainingStage(run)
    accelerator = stage.accelerator

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
        bytes_of_token = bytes_of_tokens(tokenizer, shape_of(model.config).vocab_size)
        loss = ValidationLoss(
            run.eval_steps, accelerator, model, data.validation, bytes_of_token, plan.rows, data.collate
        )
        benchmarks = Benchmarks(run.eval_task_steps, accelerator, model, tasks, stage.record_results)
        prompts += prompts_that_fit(tokenizer, data.prompts, context, run.max_new_tokens)
        write = stage.folder.append_sample
        samples = ChatSamples(
            run.sample_steps, accelerator, model, tokenizer, prompts, write, run.seed, run.max_new_tokens
        )

        # Train
        objective = LanguageModelObjective(model, run.sampled_softmax)
        epoch = Epoch(len(data.rows), count_of(len(data.rows), "row of conversations"))
        trainer = stage.trainer(plan, objective, tokenizer, batches, [loss, benchmarks, samples], epoch)
        outcome = trainer.fit()
        merge_adapter(run, stage.folder, tokenizer)

        # Report and Hub
        stage.finish(trainer, outcome, data.provenance, added_tokens)
