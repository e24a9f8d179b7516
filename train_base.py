"""Train a base model on documents: `python train_base.py --preset quickstart`, or under `torchrun`.

All flags: `python train_base.py --help`.
"""

from collections.abc import Sequence

from transformers import GenerationConfig

from fgpt_hf import FGPTForCausalLM
from fgpt_hf.command_line import command_line, parse_run
from fgpt_hf.data import open_data
from fgpt_hf.estimate import network
from fgpt_hf.evaluation import Benchmark, BenchmarkCheck, bytes_of_tokens, held_out_loss, sample
from fgpt_hf.folders import RunFolder
from fgpt_hf.forecast import fit_to_machine
from fgpt_hf.objectives import LanguageModelObjective
from fgpt_hf.presets import PRESETS
from fgpt_hf.processes import shared_machine, start
from fgpt_hf.provenance import record_provenance
from fgpt_hf.publish import Delivery
from fgpt_hf.report import report
from fgpt_hf.results import record_results
from fgpt_hf.runs import BaseRun
from fgpt_hf.tokenizer import GENERATION_IDS, build_tokenizer
from fgpt_hf.training import Check, fit


def main(arguments: Sequence[str]) -> None:
    run = parse_run(BaseRun, PRESETS, arguments)
    accelerator = start(run)
    fit_to_machine(run, network(run), shared_machine(accelerator), accelerator.print)
    folder = RunFolder(run, accelerator.process_index)
    delivery = Delivery(run, folder)
    with folder.opened():
        tokenizer = build_tokenizer(run.max_position_embeddings)
        model = new_model(run)
        data = open_data(run, accelerator.print)
        accelerator.print(f"{model.num_parameters():,} parameters; {data.description}")
        batches = data.batches(accelerator.process_index, accelerator.num_processes)
        bytes_of_token = bytes_of_tokens(tokenizer, model.config.vocab_size)
        benchmarks = [Benchmark(name, tokenizer, run.eval_task_limit) for name in run.task_names]
        check_benchmarks = BenchmarkCheck(accelerator, model, benchmarks)
        prompts = [run.sample_prompt, str(tokenizer.decode(data.held_out[0, 1:9], skip_special_tokens=True))]

        def check_held_out(step: int) -> dict[str, float]:
            return held_out_loss(accelerator, model, data.held_out, bytes_of_token, run.per_device_train_batch_size)

        def check_samples(step: int) -> dict[str, float]:
            for line in sample(accelerator, model, tokenizer, prompts, run.seed):
                folder.append("samples.jsonl", {"step": step} | line)
            return {}

        checks = [
            Check(run.eval_steps, check_held_out),
            Check(run.eval_task_steps, check_benchmarks),
            Check(run.sample_steps, check_samples),
        ]
        objective = LanguageModelObjective(model)
        state = fit(accelerator, run, folder, objective, tokenizer, batches, checks, delivery.push_checkpoint)
        record_provenance(folder, accelerator, data.origin)
        record_results(folder, accelerator, check_benchmarks.latest)
        if folder.is_writer:
            print(report(folder.path))
        delivery.finish(state.progress.step)
    accelerator.end_training()


def new_model(run: BaseRun) -> FGPTForCausalLM:
    """A network of the run's shape with GPT-2's initial weights, which ends its texts and its turns."""
    model = FGPTForCausalLM(network(run))
    model.generation_config = GenerationConfig(**GENERATION_IDS)
    return model


if __name__ == "__main__":
    command_line(main)
