"""`fgpt train-instruct`: teach a base model to answer, from conversations."""

from collections.abc import Sequence

from fgpt_hf.config.parser import parse_run
from fgpt_hf.config.presets import INSTRUCT_PRESETS
from fgpt_hf.config.runs import InstructRun
from fgpt_hf.data.instruct import chat_batch, load_instruct_data
from fgpt_hf.evaluation.benchmark import Benchmark
from fgpt_hf.evaluation.checks import (
    FIXED_PROMPTS,
    BenchmarkCheck,
    bytes_of_tokens,
    generate_answers,
    prompts_that_fit,
    validation_loss,
)
from fgpt_hf.hub.publish import CheckpointUploader
from fgpt_hf.losses.objectives import LanguageModelObjective
from fgpt_hf.report import draw_figures, summarize_run
from fgpt_hf.runtime.distributed import shared_machine, start_accelerator
from fgpt_hf.runtime.plan import choose_micro_batch
from fgpt_hf.training.finetuning import merge_adapter, open_model, resolve_max_steps
from fgpt_hf.training.loop import Check, fit
from fgpt_hf.training.run_folder import RunFolder, record_provenance, record_results


def main(arguments: Sequence[str]) -> None:
    run = parse_run(InstructRun, INSTRUCT_PRESETS, arguments)
    accelerator = start_accelerator(run)
    folder = RunFolder(run, accelerator.process_index)
    delivery = CheckpointUploader(run, folder)
    with folder.opened():
        model, tokenizer = open_model(run, accelerator.print)
        context = model.config.max_position_embeddings
        data = load_instruct_data(run, tokenizer, context)
        accelerator.print(data.description)
        resolve_max_steps(run, len(data.rows), accelerator.num_processes)
        choose_micro_batch(run, model.config, shared_machine(accelerator), accelerator.print)
        batches = data.batches(run.seed, accelerator.process_index, accelerator.num_processes)
        bytes_of_token = bytes_of_tokens(tokenizer, model.config.vocab_size)
        benchmarks = [Benchmark(name, tokenizer, run.eval_task_limit) for name in run.task_names]
        check_benchmarks = BenchmarkCheck(accelerator, model, benchmarks)
        prompts = prompts_that_fit(tokenizer, [*FIXED_PROMPTS, *data.prompts], context, run.max_new_tokens)

        def check_validation(step: int) -> dict[str, float]:
            rows = run.per_device_train_batch_size
            return validation_loss(accelerator, model, data.validation, bytes_of_token, rows, chat_batch)

        def check_answers(step: int) -> dict[str, float]:
            lines, measured = generate_answers(accelerator, model, tokenizer, prompts, run.seed, run.max_new_tokens)
            for line in lines:
                folder.append("samples.jsonl", {"step": step} | line)
            return measured

        checks = [
            Check(run.eval_steps, check_validation),
            Check(run.eval_task_steps, check_benchmarks),
            Check(run.sample_steps, check_answers),
        ]
        objective = LanguageModelObjective(model)
        state = fit(accelerator, run, folder, objective, tokenizer, batches, checks, delivery.push_checkpoint)
        merge_adapter(run, folder, tokenizer)
        record_provenance(folder, accelerator, data.origin, model.config, state.progress.tokens)
        record_results(folder, accelerator, check_benchmarks.latest)
        if folder.is_writer:
            draw_figures(folder.path)
            print(summarize_run(folder.path))
        delivery.finish(state.progress.step)
    accelerator.end_training()
