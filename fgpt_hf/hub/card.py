"""The model card: rendered from what a run recorded, around what people wrote."""

import math
import re
from pathlib import Path
from typing import Any, cast

from huggingface_hub import ModelCard, ModelCardData

from fgpt_hf.convert.stock import STOCK_CLASSES, fitting_class
from fgpt_hf.errors import UserError
from fgpt_hf.hub.card_merge import mark_as_generated, merge_card
from fgpt_hf.hub.card_options import CardOptions
from fgpt_hf.hub.card_results import all_results, metric_names, validation_measurements
from fgpt_hf.hub.card_tables import (
    answer_rows,
    architecture_rows,
    data_rows,
    dataset_names,
    other_option_rows,
    result_rows,
    training_rows,
)
from fgpt_hf.hub.front_matter import CARD, read_card
from fgpt_hf.hub.markdown import code, code_block, link, table, text
from fgpt_hf.hub.run_record import RunRecord, read_run_record
from fgpt_hf.hub.stage_record import HUB, StageRecord
from fgpt_hf.model.configuration_fgpt import FGPTConfig

TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
MARKDOWN = {"text": text, "code": code, "code_block": code_block, "link": link, "table": table}
MAX_LOSS = 100  # nats per token; the perplexity of a larger one says nothing, and may be no number
_PAPERS = {
    "DPO": ("Direct Preference Optimization", "https://arxiv.org/abs/2305.18290"),
    "IPO": ("Identity Preference Optimization", "https://arxiv.org/abs/2310.12036"),
    "SimPO": ("Simple Preference Optimization", "https://arxiv.org/abs/2405.14734"),
}


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
    return merge_card(card, read_card(file)) if file.is_file() else card


def build_card(record: RunRecord, options: CardOptions) -> str:
    """Return the card without anything that people wrote.

    Example:
        >>> print(build_card(read_run_record(Path("runs/quickstart/base/model")), CardOptions()))  # doctest: +SKIP
    """
    values = template_values(record, options)
    data = card_data(record, options)
    return mark_as_generated(str(ModelCard.from_template(data, template_path=str(TEMPLATE), **values)))


def card_data(record: RunRecord, options: CardOptions) -> ModelCardData:
    """Return the front matter, which the Hub reads; what is not known is left out."""
    results = all_results(record)
    hub_ids = [dataset.hub_id for stage in record.stages for dataset in stage.datasets if dataset.hub_id]
    return ModelCardData(
        language=options.language,
        license=card_license(record, options),
        library_name="peft" if record.is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=[
            "fgpt",
            *_architecture_tags(record, options),
            *(["conversational"] if record.is_chat_model else []),
            *_method_tags(record.stage),
        ],
        datasets=list(dict.fromkeys(hub_ids)) or None,
        base_model=(base_model := base_model_of(record, options)),
        base_model_relation=("adapter" if record.is_adapter else "finetune") if base_model else None,
        metrics=metric_names(results) or None,
        eval_results=results or None,
        model_name=card_title(record, options) if results else None,
    )


def card_title(record: RunRecord, options: CardOptions) -> str:
    """Return what the card calls the model: the name of its repo, or of its preset and stage, or of its folder."""
    if options.repo_id:
        return options.repo_id.rpartition("/")[2]
    return f"{record.stage.run.preset}-{record.stage.run.stage}" if record.stage else record.model.resolve().name


def figure_files(record: RunRecord) -> dict[str, Path]:
    """Return the run's figures by the names that they have in the published folder, losses first."""
    folder = record.run_folder / "figures" if record.run_folder else None
    figures = sorted(folder.glob("*.png"), key=lambda path: ("loss" not in path.stem, path)) if folder else []
    return {f"figures/{path.name}": path for path in figures}


def template_values(record: RunRecord, options: CardOptions) -> dict[str, Any]:
    """Return what the templates of the card and of the notebook know of a model."""
    stage, fitting = record.stage, _fitting_class(record)
    base_model = base_model_of(record, options)
    loss = next((m.value for m in validation_measurements(record) if m.metric == "loss"), None)
    return {
        **MARKDOWN,
        "record": record,
        "stage": stage,
        "is_stock": options.architecture != FGPTConfig.model_type or is_foreign(record),
        "license": card_license(record, options),
        "added_tokens": [token for each in record.stages for token in each.provenance.added_tokens],
        "stock_class": STOCK_CLASSES[fitting].network.__name__ if fitting else None,
        "stock_title": STOCK_CLASSES[fitting].title if fitting else None,
        "options": options,
        "title": card_title(record, options),
        "model_id": options.repo_id or "path/to/this/folder",
        "base_model": link(base_model, f"{HUB}/{base_model}") if base_model else None,
        "base_model_id": base_model or "path/to/the/base/model",
        "space": link(options.space, f"{HUB}/spaces/{options.space}") if options.space else None,
        "method": link(*_PAPERS[stage.method]) if stage and stage.method else None,
        "architecture": list(architecture_rows(record)),
        "data_rows": [row for each in record.stages for row in data_rows(each)],
        "validation_names": dataset_names(stage.validation_datasets) if stage else "",
        "training_rows": list(training_rows(stage, options)) if stage else [],
        "other_options": list(other_option_rows(stage)) if stage else [],
        "figures": figure_files(record),
        "result_rows": list(result_rows(record)),
        "answers": answer_rows(record),
        "validation_loss": loss,
        "perplexity": math.exp(loss) if loss is not None and loss < MAX_LOSS else None,
        "citation_key": re.sub(r"\W+", "-", options.repo_id or ""),
    }


def base_model_of(record: RunRecord, options: CardOptions) -> str | None:
    """Return the model on the Hub that the last stage, or else one before it, began with."""
    found = (stage.base_model for stage in reversed(record.stages))
    return options.base_model or next(filter(None, found), None)


def card_license(record: RunRecord, options: CardOptions) -> str | None:
    """Return the license that a person gives, or else that of the model from which the training began."""
    found = (stage.provenance.base_license for stage in reversed(record.stages))
    return options.license or next(filter(None, found), None)


def is_foreign(record: RunRecord) -> bool:
    """Return whether the network is not FGPT's, or the adapter one for such a network."""
    trained = record.stage.provenance.model_type if record.stage else None
    found = record.config.model_type if record.config else trained
    return found not in (None, FGPTConfig.model_type)


def _architecture_tags(record: RunRecord, options: CardOptions) -> list[str]:
    """Return the stock class that computes the same, by its name on the Hub, and the file format of llama.cpp."""
    fitting = _fitting_class(record)
    return [*([fitting] if fitting else []), *(["gguf"] if options.gguf else [])]


def _fitting_class(record: RunRecord) -> str | None:
    """Return the name of the class of transformers that computes the same as the model; None if there is none."""
    if record.config is None:
        return None
    if record.config.model_type != FGPTConfig.model_type:
        return record.config.model_type if record.config.model_type in STOCK_CLASSES else None
    try:
        return fitting_class(cast("FGPTConfig", record.config))
    except UserError:
        return None


def _method_tags(stage: StageRecord | None) -> list[str]:
    """Return the tags by which the Hub lists models of a method."""
    if stage is None or not stage.is_tuning:
        return []
    return [stage.method.lower()] if stage.method else ["sft"]
