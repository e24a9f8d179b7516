"""`fgpt train-base`: train a base model on documents."""

from collections.abc import Sequence

from transformers import GenerationConfig

from fgpt_hf import FGPTForCausalLM
from fgpt_hf.config.parser import parse_run
from fgpt_hf.config.presets import PRESETS
from fgpt_hf.config.runs import BaseRun
from fgpt_hf.data.pretraining import load_pretraining_data
from fgpt_hf.evaluation.benchmark import Benchmark
from fgpt_hf.evaluation.checks import BenchmarkCheck, bytes_of_tokens, generate_samples, validation_loss
from fgpt_hf.hub.publish import CheckpointUploader
from fgpt_hf.losses.objectives import LanguageModelObjective
from fgpt_hf.report import draw_figures, summarize_run
from fgpt_hf.runtime.distributed import shared_machine, start_accelerator
from fgpt_hf.runtime.estimate import network
from fgpt_hf.runtime.plan import choose_micro_batch
from fgpt_hf.tokenizer.tokenizer import GENERATION_IDS, build_tokenizer
from fgpt_hf.training.loop import Check, fit
from fgpt_hf.training.run_folder import RunFolder, record_provenance, record_results


def main(arguments: Sequence[str]) -> None:
    run = parse_run(BaseRun, PRESETS, arguments)
    accelerator = start_accelerator(run)
    choose_micro_batch(run, network(run), shared_machine(accelerator), accelerator.print)
    folder = RunFolder(run, accelerator.process_index)
    delivery = CheckpointUploader(run, folder)
    with folder.opened():
        tokenizer = build_tokenizer(run.max_position_embeddings)
        model = new_model(run)
        data = load_pretraining_data(run, accelerator.print)
        accelerator.print(f"{model.num_parameters():,} parameters; {data.description}")
        batches = data.batches(accelerator.process_index, accelerator.num_processes)
        bytes_of_token = bytes_of_tokens(tokenizer, model.config.vocab_size)
        benchmarks = [Benchmark(name, tokenizer, run.eval_task_limit) for name in run.task_names]
        check_benchmarks = BenchmarkCheck(accelerator, model, benchmarks)
        prompts = [run.sample_prompt, str(tokenizer.decode(data.validation[0, 1:9], skip_special_tokens=True))]

        def check_validation(step: int) -> dict[str, float]:
            return validation_loss(accelerator, model, data.validation, bytes_of_token, run.per_device_train_batch_size)

        def check_samples(step: int) -> dict[str, float]:
            for line in generate_samples(accelerator, model, tokenizer, prompts, run.seed):
                folder.append("samples.jsonl", {"step": step} | line)
            return {}

        checks = [
            Check(run.eval_steps, check_validation),
            Check(run.eval_task_steps, check_benchmarks),
            Check(run.sample_steps, check_samples),
        ]
        objective = LanguageModelObjective(model)
        state = fit(accelerator, run, folder, objective, tokenizer, batches, checks, delivery.push_checkpoint)
        record_provenance(folder, accelerator, data.origin, model.config, state.progress.tokens)
        record_results(folder, accelerator, check_benchmarks.latest)
        if folder.is_writer:
            draw_figures(folder.path)
            print(summarize_run(folder.path))
        delivery.finish(state.progress.step)
    accelerator.end_training()


def new_model(run: BaseRun) -> FGPTForCausalLM:
    """A network of the run's shape with GPT-2's initial weights, which ends its texts and its turns."""
    model = FGPTForCausalLM(network(run))
    model.generation_config = GenerationConfig(**GENERATION_IDS)
    return model
