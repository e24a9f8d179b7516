"""`fgpt train-base`: train a base model on documents."""

import logging
from collections.abc import Sequence

from transformers import GenerationConfig

from fgpt_hf.cli.stage import TrainingStage
from fgpt_hf.config.parser import parse_run
from fgpt_hf.config.presets import PRESETS
from fgpt_hf.config.runs import BaseRun
from fgpt_hf.data.pretraining import PretrainingData, load_pretraining_data
from fgpt_hf.data.splits import TRAIN
from fgpt_hf.evaluation.benchmark import load_benchmarks
from fgpt_hf.evaluation.checks import beginning_of, require_room
from fgpt_hf.losses.objectives import LanguageModelObjective
from fgpt_hf.model.modeling_fgpt import FGPTForCausalLM
from fgpt_hf.model.run_tokenizer import run_tokenizer
from fgpt_hf.runtime.network import network_config
from fgpt_hf.tokenizer.document_encoder import DocumentEncoder
from fgpt_hf.tokenizer.tokenizer import generation_ids
from fgpt_hf.training.outlook import Epoch
from fgpt_hf.training.start_model import StartModel, open_base_model, refuse_contradictions
from fgpt_hf.training.step_loop import Check

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str]) -> None:
    """Train the run that the command line describes."""
    # Run
    run = parse_run(BaseRun, PRESETS, arguments)
    stage = TrainingStage(run)

    with stage.opened():
        # Model
        if run.start_model is None:
            plan = stage.plan(network_config(run))
            model, tokenizer, context, encoder, _ = new_model(run)
        else:
            refuse_contradictions(run, arguments)
            model, tokenizer, context, encoder, _ = open_base_model(run, run.start_model)
            plan = stage.plan(model.config)

        # What can be refused before data is read
        tasks = load_benchmarks(run.task_names, tokenizer, context, run.eval_task_limit)
        prompt = require_room(tokenizer, run.sample_prompt, context)

        # Data
        data = load_pretraining_data(run, encoder)
        logger.info("%s", data.description)
        batches = data.batches(stage.rank, stage.processes)

        # Checks
        held_out = [beginning_of(tokenizer, row[1:], context) for row in data.validation[:1]]
        checks: list[Check] = [
            stage.validation_loss(model, tokenizer, data, plan),
            stage.benchmarks(model, tasks),
            stage.samples(model, tokenizer, [prompt, *held_out]),
        ]

        # Train
        objective = LanguageModelObjective(model, run.sampled_softmax)
        trainer = stage.trainer(plan, objective, tokenizer, batches, checks, epoch_of(data))
        outcome = trainer.fit()

        # Report and Hub
        stage.finish(trainer, outcome, data.provenance)


def epoch_of(data: PretrainingData) -> Epoch | None:
    """Return the size of the training split, or None for a stream, whose end is not known."""
    size = data.provenance.sizes.get(TRAIN)
    return Epoch(size.rows, f"{size.tokens:,} tokens", size.tokens) if size else None


def new_model(run: BaseRun) -> StartModel:
    """Return a network of the run's shape, initialized as GPT-2, that stops at the end of a text or a turn."""
    tokenizer, model = run_tokenizer(run), FGPTForCausalLM(network_config(run))
    model.generation_config = GenerationConfig(**generation_ids(tokenizer))
    return StartModel(model, tokenizer, model.config.max_position_embeddings, DocumentEncoder.of(tokenizer))
