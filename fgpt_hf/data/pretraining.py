"""What a base run trains on: rows that were prepared before, rows prepared now, or rows that stream in."""

import hashlib
import json
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import load_dataset
from filelock import FileLock
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.constants import HF_HOME
from huggingface_hub.errors import HFValidationError

from fgpt_hf.config.runs import BaseRun
from fgpt_hf.data.batches import Batches, RowChunk, ShuffledRows, StreamedRows
from fgpt_hf.data.corpora import CORPORA, HUB_NAMES, Shard, open_corpus
from fgpt_hf.data.packing import Ids
from fgpt_hf.data.prepare import prepared_once, recipe_of
from fgpt_hf.data.shards import PREPARED, PreparedRows, is_prepared, load_prepared, origin, require_fitting, summary
from fgpt_hf.data.sources import FILE_FORMATS
from fgpt_hf.data.stream import SPLITS, TRAIN, VALIDATION, TokenizerPool, epoch_start, training_buffers, validation_rows
from fgpt_hf.errors import UserError
from fgpt_hf.files import atomic_file, read_json
from fgpt_hf.retries import reading, retry
from fgpt_hf.workers import InBackground

STREAMING_WORKERS = 2


class TrainingData(NamedTuple):
    """The batches of a process, given its rank and the number of processes, and the fixed held-out rows, `(N, T)`.

    `origin` is what is known of the text behind them, as `prepared.origin` gives it.
    """

    batches: Callable[[int, int], Batches]
    validation: Ids
    description: str
    origin: dict[str, Any]


def load_pretraining_data(run: BaseRun, say: Callable[[str], None]) -> TrainingData:
    """The rows of `run.dataset_name`, which may itself be prepared rows in a folder or on the Hub.

    Raises:
        UserError: what it names cannot be read or does not fit the run, or a split of it is empty.
    """
    if (prepared := _prepared(run)) is not None:
        return _in_random_order(run, *prepared)
    if run.streaming:
        return _streamed(run)
    return _in_random_order(run, *load_prepared(prepared_once(run, say), run.max_position_embeddings))


def _prepared(run: BaseRun) -> tuple[dict[str, PreparedRows], dict[str, Any]] | None:
    """The rows that the data set's name stands for and their recipe, or None if it stands for documents."""
    name, row_length = run.dataset_name, run.max_position_embeddings
    if is_prepared(Path(name)):
        return load_prepared(Path(name), row_length)
    is_local = name in CORPORA or Path(name).exists() or Path(name).suffix in FILE_FORMATS
    if is_local or name in HUB_NAMES or not _is_prepared_on_hub(run):
        return None
    with reading(name):
        path = retry(name, lambda: hf_hub_download(name, PREPARED, repo_type="dataset", revision=run.dataset_revision))
        recipe = read_json(Path(path))
        require_fitting(name, recipe, row_length)
        rows = retry(name, lambda: load_dataset(name, revision=run.dataset_revision))
    return {split: PreparedRows(rows[split]) for split in SPLITS}, recipe


def _is_prepared_on_hub(run: BaseRun) -> bool:
    def ask() -> bool:
        return HfApi().file_exists(run.dataset_name, PREPARED, repo_type="dataset", revision=run.dataset_revision)

    try:
        with reading(run.dataset_name):
            return retry(run.dataset_name, ask)
    except HFValidationError:
        return False


def _in_random_order(run: BaseRun, rows: dict[str, PreparedRows], recipe: dict[str, Any]) -> TrainingData:
    def batches(rank: int, processes: int) -> Batches:
        return ShuffledRows(rows[TRAIN], run.seed, rank, processes)

    validation = rows[VALIDATION][list(range(min(run.max_eval_rows, len(rows[VALIDATION]))))]
    return TrainingData(batches, validation, summary(recipe), origin(recipe))


def _streamed(run: BaseRun) -> TrainingData:
    shards = open_corpus(run)
    version = recipe_of(run, shards)["shards"]

    def stretches(place: dict[str, Any]) -> Generator[RowChunk, None, None]:
        if place["shards"] != version:
            raise UserError(
                f"{run.dataset_name} has changed since the checkpoint was written, so the run cannot go on exactly: "
                "give the commit of that time as --dataset_revision"
            )
        workers = run.preprocessing_num_workers or STREAMING_WORKERS
        with closing(TokenizerPool(run, workers, in_processes=workers > 1)) as tokenising:
            for epoch, window in training_buffers(tokenising, shards, run.seed, place["epoch"], place["begin"]):
                yield RowChunk(window.rows[TRAIN].ids, {"shards": version, "epoch": epoch, "begin": window.begin})

    def batches(rank: int, processes: int) -> Batches:
        start = {"shards": version, "epoch": 0, "begin": epoch_start()}
        return StreamedRows(lambda place: InBackground(stretches(place), ahead=1), start, rank, processes)

    description = f"{run.dataset_name} in {len(shards)} shards, streamed"
    return TrainingData(batches, _validation_once(run, shards), description, {})


def _validation_once(run: BaseRun, shards: Sequence[Shard]) -> Ids:
    """The held-out rows of a stream, found once and then kept in the cache (`fgpt/validation` in `HF_HOME`)."""
    recipe = json.dumps([recipe_of(run, shards), run.max_eval_rows])
    path = Path(HF_HOME, "fgpt", "validation", hashlib.sha256(recipe.encode()).hexdigest()[:16]).with_suffix(".npy")
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not path.is_file():
            with closing(TokenizerPool(run, workers=1)) as tokenising:
                rows = validation_rows(tokenising, shards, run.max_eval_rows)
            with atomic_file(path) as partial, partial.open("wb") as file:
                np.save(file, rows)
        return np.load(path)
