"""`fgpt train-preference`: align an instruct model with preference pairs."""

import logging
from collections.abc import Sequence

from fgpt_hf.cli.stage import TrainingStage
from fgpt_hf.config.parser import parse_run
from fgpt_hf.config.presets import PREFERENCE_PRESETS
from fgpt_hf.config.runs import PreferenceRun
from fgpt_hf.data.preference import load_preference_data
from fgpt_hf.data.preference_pairs import describe_pair_columns
from fgpt_hf.evaluation.benchmark import load_benchmarks
from fgpt_hf.evaluation.checks import ValidationMeans, fixed_prompts_that_fit, prompts_that_fit
from fgpt_hf.losses.objectives import PreferenceLossConfig, PreferenceObjective
from fgpt_hf.training.finetuning import merge_adapter, reference_files, reference_log_probabilities
from fgpt_hf.training.outlook import Epoch
from fgpt_hf.training.start_model import open_model
from fgpt_hf.training.step_loop import Check
from fgpt_hf.wording import count_of

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str]) -> None:
    """Train the run that the command line describes."""
    # Run
    run = parse_run(PreferenceRun, PREFERENCE_PRESETS, arguments)
    stage = TrainingStage(run)
    accelerator = stage.accelerator

    with stage.opened():
        # Model
        if columns := describe_pair_columns(run):
            logger.info("%s", columns)
        model, tokenizer, context, _, added_tokens = open_model(run)

        # What can be refused before data is read
        stage.require_memory(model.config)
        tasks = load_benchmarks(run.task_names, tokenizer, context, run.eval_task_limit)
        prompts = fixed_prompts_that_fit(tokenizer, context, run.max_new_tokens)

        # Data
        data = load_preference_data(run, tokenizer, context)
        logger.info("%s", data.description)
        plan = stage.plan(model.config, epoch_rows=len(data.epoch))
        loss_config = PreferenceLossConfig(run.loss_type, run.beta, run.label_smoothing, run.simpo_gamma)
        if loss_config.has_reference:
            data = data.with_reference(*reference_log_probabilities(accelerator, model, data.parts, stage.folder))
        batches = data.batches(run.seed, stage.rank, stage.processes)

        # Checks
        objective = PreferenceObjective(model, loss_config)
        prompts += prompts_that_fit(tokenizer, data.prompts, context, run.max_new_tokens)
        checks: list[Check] = [
            ValidationMeans(run.eval_steps, accelerator, objective, data.validation_batches(plan.rows)),
            stage.benchmarks(model, tasks),
            stage.chat_samples(model, tokenizer, prompts),
        ]

        # Train
        epoch = Epoch(len(data.epoch), count_of(len(data.epoch), "pair"))
        files = reference_files(data.parts) if loss_config.has_reference else {}
        trainer = stage.trainer(plan, objective, tokenizer, batches, checks, epoch, files)
        outcome = trainer.fit()
        merge_adapter(run, stage.folder, tokenizer)

        # Report and Hub
        stage.finish(trainer, outcome, data.provenance, added_tokens)
