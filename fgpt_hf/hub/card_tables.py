"""The rows of a card's tables; each function yields nothing of what is not known."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields
from typing import Any

from fgpt_hf.config.runs import PreferenceRun, Run, TuningRun
from fgpt_hf.config.schedules import SCHEDULES
from fgpt_hf.hub.card_options import CardOptions
from fgpt_hf.hub.card_results import (
    Measurement,
    benchmark_measurements,
    other_measurements,
    validation_measurements,
)
from fgpt_hf.hub.markdown import Markdown, code, link, text
from fgpt_hf.hub.run_record import RunRecord
from fgpt_hf.hub.stage_record import HUB, DatasetName, StageRecord
from fgpt_hf.model.configuration_fgpt import FGPTConfig

# Options of a run that say where and how often something is written, and nothing about the model.
_HOUSEKEEPING = re.compile(
    r"(overwrite_)?output_dir|resume_.*|.*_steps|save_.*|(push_to_)?hub.*|report_to|sample_prompt|validation_prompts"
    r"|preprocessing_num_workers|max_new_tokens"
)
_SHOWN_ELSEWHERE = {  # options that the card's other tables say in words
    *("seed", "optim", "adam_beta1", "adam_beta2", "learning_rate", "lr_scheduler_type", "min_lr_ratio"),
    *("lr_decay_ratio", "weight_decay", "weight_decay_scheduler_type", "max_grad_norm", "bf16", "fp16"),
    *("per_device_train_batch_size", "auto_find_batch_size"),
    *("dataset_name", "dataset_config_name", "validation_fraction", "validation_dataset"),
    *("model_name_or_path", "assistant_only_loss", "tokenizer", "trust_remote_code"),
    *("max_position_embeddings", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("loss_type", "beta", "simpo_gamma", "label_smoothing"),
    *("use_peft", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "merge_adapter", "load_in_4bit"),
}
_PRECISIONS = {"no": "float32", "bf16": "bfloat16 (mixed)", "fp16": "float16 (mixed)"}
_BUILT_IN = {  # datasets that the training environment itself holds
    "pydocs": "docstrings of the Python packages in the training environment",
    "pydocs-chat": "questions about Python objects, answered by their docstrings",
    "pydocs-preference": "answers made from docstrings, each next to a worse one",
}


def architecture_rows(record: RunRecord) -> Iterator[tuple[str, str]]:
    """Yield the number of parameters and the shape of the network, as far as it is known."""
    yield "parameters", f"{record.parameters:,}"
    if record.config is not None and record.config.model_type != FGPTConfig.model_type:
        yield "architecture", code(record.config.model_type)
    for label, names in {
        "layers": ("num_hidden_layers",),
        "width": ("hidden_size",),
        "attention heads": ("num_attention_heads",),
        "key and value heads": ("num_key_value_heads",),
        "head size": ("head_dim",),
        "context length, tokens": ("max_position_embeddings",),
        "vocabulary size": ("vocab_size",),
        "positions": ("position_embedding",),
        "normalization": ("norm",),
        "MLP": ("mlp",),
        "activation function": ("hidden_act", "activation_function"),
        "weights": ("dtype",),
    }.items():
        value = next((getattr(record.config, name) for name in names if hasattr(record.config, name)), None)
        if value is not None:
            yield label, f"{value:,}" if isinstance(value, int) else code(str(value).removeprefix("torch."))


def data_rows(stage: StageRecord) -> Iterator[tuple[Any, ...]]:
    """Yield the stage, its data, and how many examples and tokens each split has."""
    names = dataset_names(stage.datasets)
    sizes = stage.provenance.splits
    for index, (split, size) in enumerate(sizes.items()):
        said_once = (stage.name, names) if index == 0 else ("", "")
        yield *said_once, split, f"{size.documents:,} {stage.examples}", f"{size.tokens:,}"
    if not sizes:
        yield stage.name, names, "", "", ""


def dataset_names(datasets: Sequence[DatasetName]) -> Markdown:
    """Return the names of datasets, with links and notes on them."""
    return Markdown(" + ".join(map(_dataset, datasets)))


def _dataset(dataset: DatasetName) -> str:
    url = f"{HUB}/datasets/{dataset.hub_id}" if dataset.hub_id else dataset.url
    shown = link(dataset.name, url) if url else code(dataset.name)
    note = _BUILT_IN.get(dataset.name) or (f"configuration {dataset.configuration}" if dataset.configuration else None)
    return f"{shown} ({text(note)})" if note else shown


def training_rows(stage: StageRecord, options: CardOptions) -> Iterator[tuple[str, object]]:
    """Yield what the stage took and how it was optimized, as far as it is known."""
    provenance, devices = stage.provenance, stage.provenance.processes
    hours = stage.seconds / 3600 if stage.seconds is not None else None
    device_hours = hours * devices if hours is not None and devices else None
    rows = {
        "steps": _number(stage.steps),
        "tokens processed": _number(stage.tokens),
        **dict(_hyperparameters(stage)),
        "precision": _PRECISIONS.get(provenance.precision or "", provenance.precision),
        "hardware": f"{devices} × {provenance.device}" if devices and provenance.device else None,
        "hours": _short(hours),
        "floating-point operations": f"{provenance.training_flops:.2e}" if provenance.training_flops else None,
        "estimated cost": _product(device_hours, options.dollars_per_hour, "{} USD"),
        "estimated energy": _product(device_hours, options.watts and options.watts / 1000, "{} kWh"),
    }
    yield from ((name, value) for name, value in rows.items() if value is not None)


def _hyperparameters(stage: StageRecord) -> Iterator[tuple[str, str]]:
    run, devices = stage.run, stage.provenance.processes
    if devices:
        rows = {
            "documents": f"sequences of {getattr(run, 'max_position_embeddings', 0):,} tokens",
            "conversations": "sequences",
            "pairs": "pairs",
        }[stage.examples]
        yield "batch size", f"{run.rows_per_step(devices):,} {rows}"
    yield (
        "optimizer",
        "AdamW" if run.optim == "adamw" else f"{run.optim.capitalize()} for the layers' matrices, AdamW for the rest",
    )
    yield "AdamW betas", f"{run.adam_beta1}, {run.adam_beta2}"
    yield "peak learning rate", f"{run.learning_rate:g}"
    yield "learning rate schedule", _learning_rate_schedule(run)
    falls = run.weight_decay_scheduler_type != "constant"
    yield "weight decay", f"{run.weight_decay:g}{f', {run.weight_decay_scheduler_type} to 0' * falls}"
    yield "gradient clipping", f"norm {run.max_grad_norm:g}"
    yield from _tuning_hyperparameters(run)
    yield "random seed", str(run.seed)


def _learning_rate_schedule(run: Run) -> str:
    warmup = f"{run.warmup_steps:,} steps of linear warm-up, then " if run.warmup_steps else ""
    stays = f"constant, and over the last {run.lr_decay_ratio:.0%} " if run.lr_decay_ratio < 1 else ""
    last = SCHEDULES[run.lr_scheduler_type](1.0, run.min_lr_ratio)
    end = "" if run.lr_scheduler_type == "constant" else f" to {last:.0%} of the peak"
    return f"{warmup}{stays}{run.lr_scheduler_type.replace('_', ' ')}{end}"


def _tuning_hyperparameters(run: Run) -> Iterator[tuple[str, str]]:
    """Yield what only fine-tuning has: the preference loss, the tokens that are learned, the adapters."""
    if isinstance(run, PreferenceRun):
        details = [f"beta {run.beta:g}"]
        details += [f"margin {run.simpo_gamma:g}"] if run.loss_type == "simpo" else []
        details += [f"label smoothing {run.label_smoothing:g}"] if run.label_smoothing else []
        yield "loss", f"{StageRecord(run).method}, {', '.join(details)}"
    elif isinstance(run, TuningRun):
        learned = "the assistant's replies only" if getattr(run, "assistant_only_loss", True) else "all turns"
        yield "loss", f"next token, of {learned}"
    if isinstance(run, TuningRun) and run.use_peft:
        dropout = f", dropout {run.lora_dropout:g}" if run.lora_dropout else ""
        merged = "merged into the weights" if run.merge_adapter else "kept apart"
        yield "LoRA", f"rank {run.lora_r}, alpha {run.lora_alpha:g}{dropout}, on {run.lora_target_modules}; {merged}"


def other_option_rows(stage: StageRecord) -> Iterator[tuple[Markdown, Markdown]]:
    """Yield the options about training that differ from their defaults and that no other table shows."""
    for option in fields(stage.run):
        value = getattr(stage.run, option.name)
        is_default = value is None or (option.default is not MISSING and value == option.default)
        if not (is_default or option.name in _SHOWN_ELSEWHERE or _HOUSEKEEPING.fullmatch(option.name)):
            yield code(option.name), code(stage.without_folders(str(value)))


def result_rows(record: RunRecord) -> Iterator[tuple[object, ...]]:
    """Yield each measurement: its task, metric, value with standard error, and what it means."""
    benchmarks = benchmark_measurements(record)
    for measured in (*validation_measurements(record), *benchmarks, *other_measurements(record)):
        task = code(measured.task) if measured in benchmarks else measured.task
        yield task, code(measured.metric), _with_error(measured), measured.convention or ""


def answer_rows(record: RunRecord) -> dict[str, list[tuple[Markdown, ...]]]:
    """Return, by decoding, the rows of a table: prompt, answer before training, answer after it."""
    rows: dict[str, list[tuple[Markdown, ...]]] = {}
    before = {sample.prompt: sample.outputs for sample in record.first_samples}
    for prompt, outputs in ((sample.prompt, sample.outputs) for sample in record.last_samples):
        for decoding, answer in outputs.items():
            cells = (prompt, before.get(prompt, {}).get(decoding, ""), answer)
            rows.setdefault(decoding, []).append(tuple(text(cell, line_break="<br>") for cell in cells))
    return rows


def _with_error(measured: Measurement) -> str:
    return f"{measured.value:.4f}" + (f" ± {measured.error:.4f}" if measured.error is not None else "")


def _product(hours: float | None, rate: float | None, form: str) -> str | None:
    return None if hours is None or rate is None else form.format(_short(hours * rate))


def _short(value: float | None) -> str | None:
    return None if value is None else f"{value:,.2f}" if value >= 1 else f"{value:.2g}"


def _number(value: int | None) -> str | None:
    return None if value is None else f"{value:,}"
