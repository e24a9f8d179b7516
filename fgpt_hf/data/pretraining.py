"""Load what a base run trains on: rows prepared before, rows prepared now, or rows streamed from a corpus.

Streaming starts within seconds and needs no disk, and shuffles less than prepared rows are shuffled (see `stream`).
Either way the same documents are held out, and the same first rows of them are the validation set.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from datasets import Dataset, load_dataset
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.constants import HF_HOME
from huggingface_hub.errors import HFValidationError
from torch import Tensor

from fgpt_hf.config.runs import BaseRun
from fgpt_hf.data.batches import Batches, RowChunk, ShuffledRows, StreamedRows, StreamPosition, as_batch
from fgpt_hf.data.corpora import Shard, open_corpus
from fgpt_hf.data.local_files import is_local
from fgpt_hf.data.prepare import prepared_once, recipe_of
from fgpt_hf.data.shard_records import PREPARED, Manifest, Recipe
from fgpt_hf.data.shards import (
    PreparedData,
    PreparedRows,
    is_prepared,
    load_prepared,
    require_fitting,
    require_rows,
)
from fgpt_hf.data.sources import CORPORA, DataProvenance, on_hub
from fgpt_hf.data.splits import NOTHING_HELD_OUT, TRAIN, VALIDATION, ValidationRule
from fgpt_hf.data.stream import TokenizerPool, training_buffers, validation_rows
from fgpt_hf.data.validation_rule import validation_rule
from fgpt_hf.errors import UserError
from fgpt_hf.files import cached_array, locked, sha256_of
from fgpt_hf.retries import reading, retry
from fgpt_hf.tokenizer.byte_bpe import Ids
from fgpt_hf.tokenizer.document_encoder import PROJECT_ENCODER, DocumentEncoder
from fgpt_hf.wording import count_of
from fgpt_hf.workers import BackgroundIterator

STREAMING_WORKERS = 2
RECORDED = ("dataset_name", "dataset_config_name", "validation_fraction", "validation_dataset")  # of the recipe


@dataclass(frozen=True)
class PretrainingData:
    """What a base run reads.

    Attributes:
        batches: returns the batches of a process, given its rank and the number of processes.
        validation: the fixed held-out rows, `(N, T)`.
        description: a line on the data.
        collate: makes rows a batch.
        provenance: what is known of the text, for a model card.
    """

    batches: Callable[[int, int], Batches]
    validation: Ids
    description: str
    collate: Callable[[Ids], dict[str, Tensor]] = as_batch
    provenance: DataProvenance = field(default_factory=DataProvenance)


def load_pretraining_data(run: BaseRun, encoder: DocumentEncoder = PROJECT_ENCODER) -> PretrainingData:
    """Return the data of `run.dataset_name`, which may itself be prepared rows in a folder or on the Hub.

    Args:
        encoder: makes ids and rows of documents; prepared rows must be its.

    Raises:
        UserError: the dataset cannot be read or does not fit the run, or one of its splits is empty.
    """
    name, row_length = run.dataset_name, run.max_position_embeddings
    if is_prepared(Path(name)):
        _require_no_other_validation(run)
        return _shuffled(run, load_prepared(Path(name), row_length, run.verify_rows, encoder), encoder)
    if name not in CORPORA.names and not is_local(name) and _is_prepared_on_hub(run):
        _require_no_other_validation(run)
        return _shuffled(run, _load_from_hub(run, encoder), encoder)
    if run.streaming:
        return _streamed(run, encoder)
    return _shuffled(run, prepared_once(run, run.verify_rows, encoder), encoder)


def _require_no_other_validation(run: BaseRun) -> None:
    """Raise UserError if prepared rows are given another validation set than their own."""
    if run.validation_dataset:
        raise UserError(
            f"{run.dataset_name} holds prepared rows with a validation set of their own: leave validation_dataset out, "
            "or give it to `fgpt prepare`"
        )


def _is_prepared_on_hub(run: BaseRun) -> bool:
    def ask() -> bool:
        return HfApi().file_exists(run.dataset_name, PREPARED, repo_type="dataset", revision=run.dataset_revision)

    try:
        with reading(run.dataset_name):
            return retry(run.dataset_name, ask)
    except HFValidationError:
        return False


def _load_from_hub(run: BaseRun, encoder: DocumentEncoder) -> PreparedData:
    name, revision = run.dataset_name, run.dataset_revision
    with reading(name):
        path = retry(name, lambda: hf_hub_download(name, PREPARED, repo_type="dataset", revision=revision))
        manifest = Manifest.read(Path(path))
        require_fitting(name, manifest, run.max_position_embeddings, encoder)
        found = retry(name, lambda: load_dataset(name, revision=revision))
    if manifest.sizes is None:
        raise UserError(f"the preparation of {name} is not finished: push the rows again with `fgpt prepare`")
    rows = {}
    for split, size in manifest.sizes.items():
        if not size.rows:
            rows[split] = PreparedRows(Dataset.from_dict({}), str(manifest.content))
            continue
        dataset = found.get(split, Dataset.from_dict({}))
        require_rows(f"the split {split} of {name}", dataset, size.rows, manifest.recipe.row_length)
        rows[split] = PreparedRows(dataset, str(manifest.content))
    return PreparedData(rows, manifest)


def _shuffled(run: BaseRun, data: PreparedData, encoder: DocumentEncoder) -> PretrainingData:
    collate = partial(as_batch, encoder=encoder)

    def batches(rank: int, processes: int) -> Batches:
        return ShuffledRows(data.rows[TRAIN], run.seed, rank, processes, collate)

    recipe, held_out = data.manifest.recipe, data.rows[VALIDATION]
    validation: Ids = np.empty((0, recipe.row_length), dtype=encoder.dtype)
    if len(held_out):
        validation = held_out[list(range(min(run.max_eval_rows, len(held_out))))]
    source = {name: getattr(recipe, name) for name in RECORDED}
    provenance = DataProvenance(data.manifest.sizes or {}, source)
    return PretrainingData(batches, validation, _describe(str(data.manifest), validation), collate, provenance)


def _streamed(run: BaseRun, encoder: DocumentEncoder) -> PretrainingData:
    shards, collate = open_corpus(run), partial(as_batch, encoder=encoder)
    recipe = recipe_of(run, shards, encoder)
    version, rule = f"{recipe.shards} {recipe.tokenizer}", validation_rule(run, shards)
    training = [shard for shard in shards if not shard.is_validation]

    def chunks_from(position: StreamPosition) -> Generator[RowChunk, None, None]:
        if position.corpus != version:
            if position.corpus.partition(" ")[0] == recipe.shards:
                raise UserError(
                    "the tokenizer has changed since the checkpoint was written, so the run cannot be resumed exactly: "
                    "restore its files, or start a new run"
                )
            raise UserError(
                f"{run.dataset_name} has changed since the checkpoint was written, so the run cannot be resumed "
                f"exactly: {_how_to_restore(run.dataset_name)}"
            )
        workers = run.preprocessing_num_workers or STREAMING_WORKERS
        with closing(TokenizerPool(run, workers, workers > 1, rule, encoder)) as pool:
            for epoch, buffer in training_buffers(pool, training, run.seed, position.epoch, position.start):
                yield RowChunk(buffer.rows[TRAIN].ids, StreamPosition(version, epoch, buffer.begin))

    def batches(rank: int, processes: int) -> Batches:
        return StreamedRows(
            lambda position: BackgroundIterator(chunks_from(position), ahead=2),
            StreamPosition(version),
            rank,
            processes,
            collate,
        )

    held_out = [shard for shard in shards if shard.is_validation or not run.validation_dataset]
    validation = _validation_once(run, held_out, recipe, rule, encoder)
    description = f"{run.dataset_name} in {count_of(len(training), 'shard')}, streamed"
    return PretrainingData(batches, validation, _describe(description, validation), collate)


def _describe(data: str, validation: Ids) -> str:
    """Return a line on the data, and one more where nothing is held out."""
    return data if len(validation) else f"{data}\n{NOTHING_HELD_OUT}"


def _how_to_restore(name: str) -> str:
    """Return how a user brings back the documents that a checkpoint was trained on."""
    if on_hub(name) is not None:
        return "give the commit of that time as --dataset_revision"
    cause = "the packages of that time" if name in CORPORA.embedded else "its files as they were"
    return f"restore {cause}, or start a new run"


def _validation_once(
    run: BaseRun, shards: Sequence[Shard], recipe: Recipe, rule: ValidationRule, encoder: DocumentEncoder
) -> Ids:
    """Return the held-out rows of a stream, found once and then kept in `fgpt/validation` in `HF_HOME`."""

    def find_rows() -> Ids:
        with closing(TokenizerPool(run, workers=1, rule=rule, encoder=encoder)) as pool:
            return validation_rows(pool, shards, run.max_eval_rows)

    key = sha256_of(repr((recipe, run.max_eval_rows)).encode())[:16]
    path = Path(HF_HOME, "fgpt", "validation", key).with_suffix(".array")
    with locked(path.with_suffix(".lock")):
        return cached_array(path, find_rows)
