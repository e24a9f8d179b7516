"""Teach a base model to answer: `python train_instruct.py --preset quickstart`, or under `torchrun`.

All flags: `python train_instruct.py --help`.
"""

from collections.abc import Sequence

from fgpt_hf.chat_rows import chat_batch, open_chats
from fgpt_hf.command_line import command_line, parse_run
from fgpt_hf.evaluation import Benchmark, BenchmarkCheck, bytes_of_tokens, held_out_loss
from fgpt_hf.folders import RunFolder
from fgpt_hf.forecast import fit_to_machine
from fgpt_hf.objectives import LanguageModelObjective
from fgpt_hf.presets import INSTRUCT_PRESETS
from fgpt_hf.processes import shared_machine, start
from fgpt_hf.provenance import record_provenance
from fgpt_hf.publish import Delivery
from fgpt_hf.replies import QUESTIONS, answer, fitting
from fgpt_hf.report import report
from fgpt_hf.results import record_results
from fgpt_hf.runs import InstructRun
from fgpt_hf.training import Check, fit
from fgpt_hf.tuning import merge_adapter, open_model, set_length


def main(arguments: Sequence[str]) -> None:
    run = parse_run(InstructRun, INSTRUCT_PRESETS, arguments)
    accelerator = start(run)
    folder = RunFolder(run, accelerator.process_index)
    delivery = Delivery(run, folder)
    with folder.opened():
        model, tokenizer = open_model(run, accelerator.print)
        context = model.config.max_position_embeddings
        data = open_chats(run, tokenizer, context)
        accelerator.print(data.description)
        set_length(run, len(data.rows), accelerator.num_processes)
        fit_to_machine(run, model.config, shared_machine(accelerator), accelerator.print)
        batches = data.batches(run.seed, accelerator.process_index, accelerator.num_processes)
        bytes_of_token = bytes_of_tokens(tokenizer, model.config.vocab_size)
        benchmarks = [Benchmark(name, tokenizer, run.eval_task_limit) for name in run.task_names]
        check_benchmarks = BenchmarkCheck(accelerator, model, benchmarks)
        prompts = fitting(tokenizer, [*QUESTIONS, *data.prompts], context, run.max_new_tokens)

        def check_held_out(step: int) -> dict[str, float]:
            rows = run.per_device_train_batch_size
            return held_out_loss(accelerator, model, data.held_out, bytes_of_token, rows, chat_batch)

        def check_answers(step: int) -> dict[str, float]:
            lines, measured = answer(accelerator, model, tokenizer, prompts, run.seed, run.max_new_tokens)
            for line in lines:
                folder.append("samples.jsonl", {"step": step} | line)
            return measured

        checks = [
            Check(run.eval_steps, check_held_out),
            Check(run.eval_task_steps, check_benchmarks),
            Check(run.sample_steps, check_answers),
        ]
        objective = LanguageModelObjective(model)
        state = fit(accelerator, run, folder, objective, tokenizer, batches, checks, delivery.push_checkpoint)
        merge_adapter(run, folder, tokenizer)
        record_provenance(folder, accelerator, data.origin)
        record_results(folder, accelerator, check_benchmarks.latest)
        if folder.is_writer:
            print(report(folder.path))
        delivery.finish(state.progress.step)
    accelerator.end_training()


if __name__ == "__main__":
    command_line(main)
