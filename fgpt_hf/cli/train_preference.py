"""`fgpt train-preference`: align an instruct model with preference pairs."""

from collections.abc import Sequence

from fgpt_hf.config.parser import parse_run
from fgpt_hf.config.presets import PREFERENCE_PRESETS
from fgpt_hf.config.runs import PreferenceRun
from fgpt_hf.data.preference import load_preference_data
from fgpt_hf.evaluation.checks import FIXED_PROMPTS, generate_answers, prompts_that_fit, validation_means
from fgpt_hf.hub.publish import CheckpointUploader
from fgpt_hf.losses.objectives import PreferenceLossConfig, PreferenceObjective
from fgpt_hf.report import draw_figures, summarize_run
from fgpt_hf.runtime.distributed import shared_machine, start_accelerator
from fgpt_hf.runtime.plan import choose_micro_batch
from fgpt_hf.training.finetuning import merge_adapter, open_model, reference_log_probabilities, resolve_max_steps
from fgpt_hf.training.loop import Check, fit
from fgpt_hf.training.run_folder import RunFolder, record_provenance


def main(arguments: Sequence[str]) -> None:
    run = parse_run(PreferenceRun, PREFERENCE_PRESETS, arguments)
    accelerator = start_accelerator(run)
    folder = RunFolder(run, accelerator.process_index)
    delivery = CheckpointUploader(run, folder)
    with folder.opened():
        model, tokenizer = open_model(run, accelerator.print)
        context = model.config.max_position_embeddings
        data = load_preference_data(run, tokenizer, context)
        accelerator.print(data.description)
        resolve_max_steps(run, len(data.epoch), accelerator.num_processes)
        choose_micro_batch(run, model.config, shared_machine(accelerator), accelerator.print)
        aim = PreferenceLossConfig(run.loss_type, run.beta, run.label_smoothing, run.simpo_gamma)
        if aim.has_reference:
            data = data.with_reference(reference_log_probabilities(accelerator, model, data.all_pairs))
        objective = PreferenceObjective(model, aim)
        batches = data.batches(run.seed, accelerator.process_index, accelerator.num_processes)
        validation = data.validation_batches(run.per_device_train_batch_size)
        prompts = prompts_that_fit(tokenizer, [*FIXED_PROMPTS, *data.prompts], context, run.max_new_tokens)

        def check_validation(step: int) -> dict[str, float]:
            return validation_means(accelerator, objective, validation)

        def check_answers(step: int) -> dict[str, float]:
            lines, measured = generate_answers(accelerator, model, tokenizer, prompts, run.seed, run.max_new_tokens)
            for line in lines:
                folder.append("samples.jsonl", {"step": step} | line)
            return measured

        checks = [Check(run.eval_steps, check_validation), Check(run.sample_steps, check_answers)]
        state = fit(accelerator, run, folder, objective, tokenizer, batches, checks, delivery.push_checkpoint)
        merge_adapter(run, folder, tokenizer)
        record_provenance(folder, accelerator, data.origin, model.config, state.progress.tokens)
        if folder.is_writer:
            draw_figures(folder.path)
            print(summarize_run(folder.path))
        delivery.finish(state.progress.step)
    accelerator.end_training()
