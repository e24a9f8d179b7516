"""Let a model prefer the better of two replies: `python train_preference.py --preset quickstart`, or under `torchrun`.

All flags: `python train_preference.py --help`.
"""

from collections.abc import Sequence

from fgpt_hf.boundaries import context_length
from fgpt_hf.command_line import command_line, parse_run
from fgpt_hf.evaluation import held_out_means
from fgpt_hf.folders import RunFolder, model_folder
from fgpt_hf.loading import load_model
from fgpt_hf.pair_rows import open_pairs
from fgpt_hf.preference import Aim, PreferenceObjective
from fgpt_hf.presets import PREFERENCE_PRESETS
from fgpt_hf.provenance import record_provenance
from fgpt_hf.publish import Delivery
from fgpt_hf.reference import reference_log_probabilities
from fgpt_hf.report import report
from fgpt_hf.runs import PreferenceRun
from fgpt_hf.training import Check, fit, start


def main(arguments: Sequence[str]) -> None:
    run = parse_run(PreferenceRun, PREFERENCE_PRESETS, arguments)
    accelerator = start(run)
    folder = RunFolder(run, accelerator.process_index)
    delivery = Delivery(run, folder)
    with folder.opened():
        from pathlib import Path

        model, tokenizer = load_model(str(model_folder(Path(run.model_name_or_path))))
        data = open_pairs(run, tokenizer, context_length(model, tokenizer))
        accelerator.print(f"{model.num_parameters():,} parameters; {data.description}")
        aim = Aim(run.loss_type, run.beta, run.label_smoothing, run.simpo_gamma)
        if aim.has_reference:
            data = data.with_reference(reference_log_probabilities(accelerator, model, data.all_pairs))
        objective = PreferenceObjective(model, aim)
        held_out = data.held_out_batches(run.per_device_train_batch_size)
        batches = data.batches(run.seed, accelerator.process_index, accelerator.num_processes)

        def check_held_out(step: int) -> dict[str, float]:
            return held_out_means(accelerator, objective, held_out)

        checks = [Check(run.eval_steps, check_held_out)]
        fit(accelerator, run, folder, objective, tokenizer, batches, checks, delivery.push_checkpoint)
        record_provenance(folder, accelerator, data.origin)
        if folder.is_writer:
            print(report(folder.path))
        delivery.finish()
    accelerator.end_training()


if __name__ == "__main__":
    command_line(main)
