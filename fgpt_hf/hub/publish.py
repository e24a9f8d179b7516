"""Publish a model on the Hub: its files, its card and notebook, its run's figures, results and record."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

from fgpt_hf.convert.export import write_stock
from fgpt_hf.convert.stock import AUTO, fitting_class, to_stock
from fgpt_hf.errors import UserError
from fgpt_hf.files import json_lines
from fgpt_hf.hub.card import base_model_of, card_license, figure_files, is_foreign, update_card
from fgpt_hf.hub.card_merge import merge_card
from fgpt_hf.hub.card_options import CardOptions
from fgpt_hf.hub.card_results import result_files
from fgpt_hf.hub.front_matter import CARD, read_card
from fgpt_hf.hub.gguf_files import gguf_files, types_of
from fgpt_hf.hub.notebook import NOTEBOOK, build_notebook, is_edited
from fgpt_hf.hub.published_files import Content, Files, publishable, refuse_links
from fgpt_hf.hub.run_record import RunRecord, read_run_record
from fgpt_hf.hub.upload import Destination, PublishedFiles, check_destination, check_hub_id, push_files
from fgpt_hf.model.configuration_fgpt import FGPTConfig
from fgpt_hf.model.io import load_fgpt, load_model, model_folder
from fgpt_hf.training.records import METRICS, PROVENANCE, RECORD, RESULTS, SAMPLES, find_run

logger = logging.getLogger(__name__)


def publish(model: Path, destination: Destination, options: CardOptions) -> str:
    """Publish a model's folder, or a run's, with its card; return the commit's URL.

    What people wrote in the card or the notebook on the Hub stays. `options.architecture` publishes the same network as
    a class of transformers, and `options.gguf` adds GGUF files.

    Raises:
        UserError: not a model's folder, or one whose files are damaged; a card that was edited here and on the Hub;
            or as `push_files`.

    Example:
        >>> options = CardOptions(license="mit", language="en")
        >>> publish(Path("runs/quickstart/base"), Destination(repo_id="user/name"), options)  # doctest: +SKIP
        'https://huggingface.co/user/name/commit/…'
    """
    with files_to_publish(model, destination, options) as files:
        message = commit_message(read_run_record(model_folder(model)))
        return push_files(files, destination, message, keep_published_text)


@contextmanager
def files_to_publish(model: Path, destination: Destination, options: CardOptions) -> Iterator[dict[str, Content]]:
    """Yield all files of a publication, by their path in the repo; they exist until the block ends.

    Raises:
        UserError: not a model's folder, or one with links or damaged files in it; not a name for a repo, a branch, a
            tag or a base model; the stock class or llama.cpp cannot express the network.
    """
    check_destination(destination)
    if options.base_model is not None:
        check_hub_id("base_model", options.base_model)
    folder = model_folder(model)
    refuse_links(model, [folder])
    files = publishable(folder)
    record = _linkless_record(folder)
    architecture = _architecture(record, options)
    with TemporaryDirectory() as scratch:
        if record.config is not None and architecture != record.config.model_type:
            write_stock(*load_fgpt(str(record.model)), Path(scratch, architecture), architecture)
            files = publishable(Path(scratch, architecture))
        for_llama_cpp = _gguf_files(record, destination, options, Path(scratch))
        is_others = base_model_of(record, options) is not None or is_foreign(record)
        if is_others and card_license(record, options) is None:
            logger.warning("the license of the model that training began with is not known: name one with --license")
        options = replace(options, repo_id=destination.repo_id, architecture=architecture, gguf=types_of(for_llama_cpp))
        added: dict[str, Content] = {CARD: update_card(record, options).encode(), **figure_files(record)}
        added |= {NOTEBOOK: build_notebook(record, options)}
        yield {**files, **for_llama_cpp, **added, **result_files(record), **record_files(record)}


def _architecture(record: RunRecord, options: CardOptions) -> str:
    """Return the type of the model to publish; raise UserError if this one cannot be published so."""
    wanted, folder = options.architecture, record.model
    if record.is_adapter and (wanted != FGPTConfig.model_type or options.gguf):
        what = "with GGUF files" if wanted == FGPTConfig.model_type else f"as {wanted}"
        raise UserError(
            f"{folder} is an adapter, which cannot be published {what}: merge it with `fgpt export {folder} FOLDER "
            "--format auto`, and publish that folder"
        )
    present = record.config.model_type if record.config else wanted
    if present != FGPTConfig.model_type and wanted not in (FGPTConfig.model_type, AUTO, present):
        raise UserError(f"{folder} holds a model of type {present!r}: it cannot be published as {wanted}")
    if present != FGPTConfig.model_type or wanted == FGPTConfig.model_type:
        return present
    config = cast("FGPTConfig", record.config)
    return fitting_class(config) if wanted == AUTO else wanted


def _gguf_files(record: RunRecord, destination: Destination, options: CardOptions, scratch: Path) -> dict[str, Content]:
    """Write the GGUF files that are to go with the model, and return them with those for Ollama."""
    if not options.gguf or record.config is None:
        return {}
    if record.config.model_type == FGPTConfig.model_type:
        model, tokenizer = load_fgpt(str(record.model))
        network = to_stock(model)
    else:
        network, tokenizer = load_model(str(record.model), dtype="auto")
    name = destination.repo_id.rpartition("/")[2]
    return gguf_files(network, tokenizer, scratch, name, options.gguf, record.is_chat_model)


def _linkless_record(model: Path) -> RunRecord:
    """Return what a model's folder and its run's folder say; raise UserError if a file of the run is a link."""
    if run := find_run(model):
        figures = (run / "figures").glob("*.png")
        refuse_links(run, [*(run / name for name in (RECORD, METRICS, SAMPLES, RESULTS, PROVENANCE)), *figures])
    return read_run_record(model)


def keep_published_text(files: Files, published: PublishedFiles) -> Files:
    """Return the files with what people wrote in the published card and notebook; for `push_files`."""
    notebook = published.download(NOTEBOOK)
    if notebook and is_edited(notebook.read_bytes()):
        files = {name: content for name, content in files.items() if name != NOTEBOOK}
    text = published.read_card()
    if text is None or CARD not in files:
        return files
    new = files[CARD]
    card = new.decode() if isinstance(new, bytes) else read_card(new)
    return {**files, CARD: merge_card(card, text, keep_results=published.has_same_weights(files)).encode()}


def record_files(record: RunRecord) -> dict[str, bytes]:
    """Return what the run measured and wrote as it went, for a Space to show; no path of the machine is in it."""
    samples = [{"step": sample.step, "prompt": sample.prompt, **sample.outputs} for sample in record.samples]
    files = {METRICS: json_lines(record.metrics).encode(), SAMPLES: json_lines(samples).encode()}
    return {name: content for name, content in files.items() if content}


def size_table(files: Files) -> str:
    """Return a table of what would be published: the bytes of each file, and of all.

    Example:
        >>> print(size_table({"config.json": b"{}"}))
                      2  config.json
                      2  bytes in 1 files
    """
    sizes = {name: len(file) if isinstance(file, bytes) else file.stat().st_size for name, file in files.items()}
    lines = [f"{size:>15,}  {name}" for name, size in sorted(sizes.items())]
    return "\n".join([*lines, f"{sum(sizes.values()):>15,}  bytes in {len(files)} files"])


def commit_message(record: RunRecord) -> str:
    """Return the commit's title: step, tokens and loss of the run, as far as they are known."""
    last = record.last
    if "step" not in last:
        return "Publish the model"
    losses = {"eval_loss": "validation loss", "loss": "training loss"}
    loss = next((f", {name} {last[key]:.3f}" for key, name in losses.items() if key in last), "")
    return f"Step {last['step']:,}: {last['tokens']:,} tokens{loss}"
