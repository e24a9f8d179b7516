"""Let a model prefer the better of two replies: `python train_preference.py --preset quickstart`, or under `torchrun`.

All flags: `python train_preference.py --help`.
"""

from collections.abc import Sequence

from fgpt_hf.command_line import command_line, parse_run
from fgpt_hf.evaluation import held_out_means
from fgpt_hf.folders import RunFolder
from fgpt_hf.forecast import fit_to_machine
from fgpt_hf.pair_rows import open_pairs
from fgpt_hf.preference import Aim, PreferenceObjective
from fgpt_hf.presets import PREFERENCE_PRESETS
from fgpt_hf.processes import shared_machine, start
from fgpt_hf.provenance import record_provenance
from fgpt_hf.publish import Delivery
from fgpt_hf.reference import reference_log_probabilities
from fgpt_hf.replies import QUESTIONS, answer, fitting
from fgpt_hf.report import report
from fgpt_hf.runs import PreferenceRun
from fgpt_hf.training import Check, fit
from fgpt_hf.tuning import merge_adapter, open_model, set_length


def main(arguments: Sequence[str]) -> None:
    run = parse_run(PreferenceRun, PREFERENCE_PRESETS, arguments)
    accelerator = start(run)
    folder = RunFolder(run, accelerator.process_index)
    delivery = Delivery(run, folder)
    with folder.opened():
        model, tokenizer = open_model(run, accelerator.print)
        context = model.config.max_position_embeddings
        data = open_pairs(run, tokenizer, context)
        accelerator.print(data.description)
        set_length(run, len(data.epoch), accelerator.num_processes)
        fit_to_machine(run, model.config, shared_machine(accelerator), accelerator.print)
        aim = Aim(run.loss_type, run.beta, run.label_smoothing, run.simpo_gamma)
        if aim.has_reference:
            data = data.with_reference(reference_log_probabilities(accelerator, model, data.all_pairs))
        objective = PreferenceObjective(model, aim)
        batches = data.batches(run.seed, accelerator.process_index, accelerator.num_processes)
        held_out = data.held_out_batches(run.per_device_train_batch_size)
        prompts = fitting(tokenizer, [*QUESTIONS, *data.prompts], context, run.max_new_tokens)

        def check_held_out(step: int) -> dict[str, float]:
            return held_out_means(accelerator, objective, held_out)

        def check_answers(step: int) -> dict[str, float]:
            lines, measured = answer(accelerator, model, tokenizer, prompts, run.seed, run.max_new_tokens)
            for line in lines:
                folder.append("samples.jsonl", {"step": step} | line)
            return measured

        checks = [Check(run.eval_steps, check_held_out), Check(run.sample_steps, check_answers)]
        state = fit(accelerator, run, folder, objective, tokenizer, batches, checks, delivery.push_checkpoint)
        merge_adapter(run, folder, tokenizer)
        record_provenance(folder, accelerator, data.origin)
        if folder.is_writer:
            print(report(folder.path))
        delivery.finish(state.progress.step)
    accelerator.end_training()


if __name__ == "__main__":
    command_line(main)
