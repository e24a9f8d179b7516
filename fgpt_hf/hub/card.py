"""The model card: rendered from what a run recorded, around what people wrote."""

import re
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from fgpt_hf.config.runs import PreferenceRun, Run, TuningRun
from fgpt_hf.hub import markdown
from fgpt_hf.hub.card_merge import CARD, mark_as_generated, merge_card
from fgpt_hf.hub.card_results import (
    Measurement,
    all_results,
    benchmark_measurements,
    metric_names,
    other_measurements,
    validation_measurements,
)
from fgpt_hf.hub.markdown import Markdown, code, link
from fgpt_hf.hub.run_record import RunRecord, read_run_record
from fgpt_hf.hub.stage import DatasetName, Stage

TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
HUB = "https://huggingface.co"
# Options of a run that say where and how often something is written, and nothing about the model.
_HOUSEKEEPING = re.compile(
    r"(overwrite_)?output_dir|resume_.*|.*_steps|save_.*|(push_to_)?hub.*|report_to|sample_prompt|validation_prompts"
    r"|preprocessing_num_workers|max_new_tokens"
)
_SHOWN_ELSEWHERE = {  # options that the card's other tables say in words
    *("seed", "optim", "adam_beta1", "adam_beta2", "learning_rate", "lr_scheduler_type", "min_lr_ratio"),
    *("weight_decay", "max_grad_norm", "per_device_train_batch_size", "auto_find_batch_size", "bf16", "fp16"),
    *("dataset_name", "dataset_config_name", "validation_fraction", "model_name_or_path", "assistant_only_loss"),
    *("max_position_embeddings", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("loss_type", "beta", "simpo_gamma", "label_smoothing"),
    *("use_peft", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "merge_adapter"),
}
_PRECISIONS = {"no": "float32", "bf16": "bfloat16 (mixed)", "fp16": "float16 (mixed)"}
_PAPERS = {
    "DPO": ("Direct Preference Optimization", "https://arxiv.org/abs/2305.18290"),
    "IPO": ("Identity Preference Optimization", "https://arxiv.org/abs/2310.12036"),
    "SimPO": ("Simple Preference Optimization", "https://arxiv.org/abs/2405.14734"),
}
_BUILT_IN = {  # data sets that the training environment itself holds
    "pydocs": "docstrings of the Python packages in the training environment",
    "pydocs-chat": "questions about Python objects, answered by their docstrings",
    "pydocs-preference": "answers made from docstrings, each beside a worse one",
}


@dataclass(frozen=True, kw_only=True)
class CardOptions:
    """What a person can say of a model and no run knows; whatever is not given is left out of the card.

    Attributes:
        repo_id: where the model is published.
        stock: whether it is published as a GPT-2, which needs no remote code.
        license: the license of the weights, such as mit.
        language: the language of the data, such as en.
        base_model: the model on the Hub from which this one was trained.
        space: the Space that serves the model.
        dollars_per_hour: the price of one device.
        watts: the power of one device.
    """

    repo_id: str | None = None
    stock: bool = False
    license: str | None = None
    language: str | None = None
    base_model: str | None = None
    space: str | None = None
    dollars_per_hour: float | None = None
    watts: float | None = None


def write_card(model: Path) -> Path:
    """Write the card of a model's folder from its files and its run's; what people wrote in an older one stays.

    Returns:
        The card's path, `README.md` in the folder.

    Raises:
        UserError: one of the files is damaged.

    Example:
        >>> write_card(Path("runs/quickstart/base/model"))  # doctest: +SKIP
        PosixPath('runs/quickstart/base/model/README.md')
    """
    (model / CARD).write_text(update_card(read_run_record(model), CardOptions()), encoding="utf-8")
    return model / CARD


def update_card(record: RunRecord, options: CardOptions) -> str:
    """Return a new card that keeps what people wrote in the one of the model's folder."""
    card, file = build_card(record, options), record.model / CARD
    return merge_card(card, file.read_text(encoding="utf-8")) if file.is_file() else card


def build_card(record: RunRecord, options: CardOptions) -> str:
    """Return the card without anything that people wrote.

    Example:
        >>> print(build_card(read_run_record(Path("runs/quickstart/base/model")), CardOptions()))  # doctest: +SKIP
    """
    values = {**vars(markdown), **_template_values(record, options)}
    data = card_data(record, options)
    return mark_as_generated(str(ModelCard.from_template(data, template_path=str(TEMPLATE), **values)))


def card_data(record: RunRecord, options: CardOptions) -> ModelCardData:
    """Return the front matter, which the Hub reads; whatever is not known is left out."""
    results = all_results(record)
    hub_ids = [dataset.hub_id for stage in record.stages for dataset in stage.datasets if dataset.hub_id]
    return ModelCardData(
        language=options.language,
        license=options.license,
        library_name="peft" if record.is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["fgpt", "gpt2", *(["conversational"] if record.is_chat_model else []), *_method_tags(record.stage)],
        datasets=list(dict.fromkeys(hub_ids)) or None,
        base_model=_base_model(record, options),
        metrics=metric_names(results) or None,
        eval_results=results or None,
        model_name=card_title(record, options) if results else None,
    )


def card_title(record: RunRecord, options: CardOptions) -> str:
    """Return what the card calls the model: the name of its repo, or of its preset and stage, or of its folder."""
    if options.repo_id:
        return options.repo_id.rpartition("/")[2]
    return f"{record.stage.run.preset}-{record.stage.short_name}" if record.stage else record.model.resolve().name


def figure_files(record: RunRecord) -> dict[str, Path]:
    """Return the run's figures by the names that they have in the published folder, losses first."""
    folder = record.run_folder / "figures" if record.run_folder else None
    figures = sorted(folder.glob("*.png"), key=lambda path: ("loss" not in path.stem, path)) if folder else []
    return {f"figures/{path.name}": path for path in figures}


def _template_values(record: RunRecord, options: CardOptions) -> dict[str, Any]:
    stage = record.stage
    base_model = _base_model(record, options)
    return {
        "record": record,
        "stage": stage,
        "options": options,
        "title": card_title(record, options),
        "model_id": options.repo_id or "path/to/this/folder",
        "base_model": link(base_model, f"{HUB}/{base_model}") if base_model else None,
        "base_model_id": base_model or "path/to/the/base/model",
        "space": link(options.space, f"{HUB}/spaces/{options.space}") if options.space else None,
        "method": link(*_PAPERS[stage.method]) if stage and stage.method else None,
        "architecture": list(_architecture(record)),
        "data_rows": [row for each in record.stages for row in _data_rows(each)],
        "training_rows": list(_training_rows(stage, options)) if stage else [],
        "other_options": list(_other_options(stage)) if stage else [],
        "figures": figure_files(record),
        "result_rows": list(_result_rows(record)),
        "answers": _answers(record),
        "validation_loss": next((m.value for m in validation_measurements(record) if m.metric == "loss"), None),
        "citation_key": re.sub(r"\W+", "-", options.repo_id or ""),
    }


def _base_model(record: RunRecord, options: CardOptions) -> str | None:
    return options.base_model or (record.stage.base_model if record.stage else None)


def _method_tags(stage: Stage | None) -> list[str]:
    """Return the tags by which the Hub lists models of a method."""
    if stage is None or not stage.is_tuning:
        return []
    return [stage.method.lower()] if stage.method else ["sft"]


def _architecture(record: RunRecord) -> Iterator[tuple[str, str]]:
    yield "parameters", f"{record.parameters:,}"
    for label, names in {
        "layers": ("num_hidden_layers",),
        "width": ("hidden_size",),
        "attention heads": ("num_attention_heads",),
        "context length, tokens": ("max_position_embeddings",),
        "vocabulary size": ("vocab_size",),
        "activation function": ("hidden_act", "activation_function"),
        "weights": ("dtype",),
    }.items():
        value = next((getattr(record.config, name) for name in names if hasattr(record.config, name)), None)
        if value is not None:
            yield label, f"{value:,}" if isinstance(value, int) else code(str(value).removeprefix("torch."))


def _data_rows(stage: Stage) -> Iterator[tuple[Any, ...]]:
    """Return the stage, its data, and how many examples and tokens each split has."""
    names = Markdown(" + ".join(map(_dataset, stage.datasets)))
    sizes = stage.provenance.splits
    for index, (split, size) in enumerate(sizes.items()):
        said_once = (stage.name, names) if index == 0 else ("", "")
        yield *said_once, split, f"{size.documents:,} {stage.examples}", f"{size.tokens:,}"
    if not sizes:
        yield stage.name, names, "", "", ""


def _dataset(dataset: DatasetName) -> str:
    url = f"{HUB}/datasets/{dataset.hub_id}" if dataset.hub_id else dataset.url
    shown = link(dataset.name, url) if url else code(dataset.name)
    told = _BUILT_IN.get(dataset.name) or (f"configuration {dataset.configuration}" if dataset.configuration else None)
    return f"{shown} ({markdown.text(told)})" if told else shown


def _training_rows(stage: Stage, options: CardOptions) -> Iterator[tuple[str, object]]:
    """Return what the stage took and how it was optimized, as far as it is known."""
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


def _hyperparameters(stage: Stage) -> Iterator[tuple[str, str]]:
    run, devices = stage.run, stage.provenance.processes
    if devices:
        rows = {
            "documents": f"sequences of {getattr(run, 'max_position_embeddings', 0):,} tokens",
            "conversations": "sequences",
            "pairs": "pairs",
        }[stage.examples]
        yield "batch size", f"{run.rows_per_step(devices):,} {rows}"
    yield "optimizer", {"muon": "Muon for the layers' matrices, AdamW for the rest", "adamw": "AdamW"}[run.optim]
    yield "AdamW betas", f"{run.adam_beta1}, {run.adam_beta2}"
    yield "peak learning rate", f"{run.learning_rate:g}"
    end = "" if run.lr_scheduler_type == "constant" else f" to {run.min_lr_ratio:.0%} of the peak"
    schedule = run.lr_scheduler_type.replace("_", " ")
    yield "learning rate schedule", f"{run.warmup_steps:,} steps of linear warm-up, then {schedule}{end}"
    yield "weight decay", f"{run.weight_decay:g}"
    yield "gradient clipping", f"norm {run.max_grad_norm:g}"
    yield from _tuning_hyperparameters(run)
    yield "random seed", str(run.seed)


def _tuning_hyperparameters(run: Run) -> Iterator[tuple[str, str]]:
    """Return what only fine-tuning has: the preference loss, the tokens that are learned, the adapters."""
    if isinstance(run, PreferenceRun):
        details = [f"beta {run.beta:g}"]
        details += [f"margin {run.simpo_gamma:g}"] if run.loss_type == "simpo" else []
        details += [f"label smoothing {run.label_smoothing:g}"] if run.label_smoothing else []
        yield "loss", f"{Stage(run).method}, {', '.join(details)}"
    elif isinstance(run, TuningRun):
        only_replies = getattr(run, "assistant_only_loss", True)
        yield (
            "loss",
            f"next token, {'of the assistant' + chr(39) + 's replies only' if only_replies else 'of all turns'}",
        )
    if isinstance(run, TuningRun) and run.use_peft:
        dropout = f", dropout {run.lora_dropout:g}" if run.lora_dropout else ""
        merged = "merged into the weights" if run.merge_adapter else "kept apart"
        yield "LoRA", f"rank {run.lora_r}, alpha {run.lora_alpha:g}{dropout}, on {run.lora_target_modules}; {merged}"


def _other_options(stage: Stage) -> Iterator[tuple[Markdown, Markdown]]:
    """Return the options about training that differ from their defaults and that no other table shows."""
    for option in fields(stage.run):
        value = getattr(stage.run, option.name)
        is_default = value is None or (option.default is not MISSING and value == option.default)
        if not (is_default or option.name in _SHOWN_ELSEWHERE or _HOUSEKEEPING.fullmatch(option.name)):
            yield code(option.name), code(stage.without_folders(str(value)))


def _result_rows(record: RunRecord) -> Iterator[tuple[object, ...]]:
    benchmarks = benchmark_measurements(record)
    for measured in (*validation_measurements(record), *benchmarks, *other_measurements(record)):
        task = code(measured.task) if measured in benchmarks else measured.task
        yield task, code(measured.metric), _with_error(measured), measured.convention or ""


def _answers(record: RunRecord) -> dict[str, list[tuple[Markdown, ...]]]:
    """Return, by decoding, the rows of a table: prompt, answer before training, answer after it."""
    rows: dict[str, list[tuple[Markdown, ...]]] = {}
    before = {sample.prompt: sample.outputs for sample in record.first_samples}
    for prompt, outputs in ((sample.prompt, sample.outputs) for sample in record.last_samples):
        for decoding, answer in outputs.items():
            cells = (prompt, before.get(prompt, {}).get(decoding, ""), answer)
            rows.setdefault(decoding, []).append(tuple(markdown.text(cell, line_break="<br>") for cell in cells))
    return rows


def _with_error(measured: Measurement) -> str:
    return f"{measured.value:.4f}" + (f" ± {measured.error:.4f}" if measured.error is not None else "")


def _product(hours: float | None, rate: float | None, form: str) -> str | None:
    return None if hours is None or rate is None else form.format(_short(hours * rate))


def _short(value: float | None) -> str | None:
    return None if value is None else f"{value:,.2f}" if value >= 1 else f"{value:.2g}"


def _number(value: int | None) -> str | None:
    return None if value is None else f"{value:,}"
