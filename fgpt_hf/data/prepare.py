"""Making prepared rows: documents are tokenised once, into shards; what was interrupted goes on with the next shard."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow
from filelock import FileLock
from huggingface_hub.constants import HF_HOME

from fgpt_hf.config.runs import Preparation, TextSource
from fgpt_hf.data.corpora import Shard, open_corpus
from fgpt_hf.data.packing import PackingStats
from fgpt_hf.data.shards import (
    COLUMN,
    PREPARED,
    ShardRecord,
    is_prepared,
    push_dataset,
    shard_name,
    total_tokens,
    whole_shards,
)
from fgpt_hf.data.stream import SPLITS, TRAIN, VALIDATION, PackedBuffer, TokenizerPool, epoch_start, no_rows
from fgpt_hf.errors import UserError
from fgpt_hf.files import atomic_directory, read_json, write_json
from fgpt_hf.tokenizer.tokenizer import tokenizer_fingerprint

FORMAT_VERSION = 1  # to be raised whenever the same documents would give other rows
SHARD_TOKENS = 1 << 27  # of training rows: 256 MiB, of which a hundred billion tokens need fewer than a thousand files


def prepare_documents(preparation: Preparation) -> str:
    """What `fgpt prepare` does; returns what it says in the end."""
    folder = Path(preparation.output_dir)
    records = prepare(preparation, folder, preparation.max_train_tokens, in_processes=True)
    said = packing_report(records)
    if preparation.hub_dataset_id:
        push_dataset(folder, preparation.hub_dataset_id)
        said += f"\ntrain on them with --dataset_name {preparation.hub_dataset_id}"
    return f"{said}\ntrain on them with --dataset_name {folder}"


def prepare(
    source: TextSource,
    folder: Path,
    max_train_tokens: int | None = None,
    say: Callable[[str], None] = print,
    in_processes: bool = False,
) -> list[ShardRecord]:
    """Make the rows of all documents, or go on doing so, until about `max_train_tokens` are there.

    The rows do not depend on how often this was interrupted or on how many workers there are. Worker processes take
    seconds to start, which much text is worth. Of processes that want the same folder, one works and the others wait.

    Raises:
        UserError: the corpus cannot be read; the folder holds rows of another corpus, tokenizer, length or split.
        OSError: no space; the shards that are whole stay.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        shards = open_corpus(source)
        recipe = recipe_of(source, shards)
        _require_recipe(folder, recipe)
        records = whole_shards(folder)
        if not _is_finished(records, max_train_tokens):
            write_json(folder / PREPARED, {**recipe, "finished": False})
            workers = source.preprocessing_num_workers or os.cpu_count() or 1
            try:
                with closing(TokenizerPool(source, workers, in_processes=in_processes and workers > 1)) as tokenising:
                    for record in _new_shards(folder, records, tokenising, shards, max_train_tokens):
                        records.append(record)
                        say(f"{folder}: {len(records)} shards, {total_tokens(records, 'tokens', TRAIN):,} tokens")
            except OSError as error:
                raise OSError(_interrupted(folder, records, error)) from error
        for split in SPLITS:
            if not total_tokens(records, "rows", split):
                raise no_rows(source.validation_fraction, split)
        write_json(folder / PREPARED, {**recipe, "finished": True, "sizes": _sizes(records)})
        return records


def prepared_once(source: TextSource, say: Callable[[str], None]) -> Path:
    """The folder in the cache (`fgpt/prepared` in `HF_HOME`) that holds the rows of these documents as they are now."""
    key = hashlib.sha256(json.dumps(recipe_of(source, open_corpus(source))).encode()).hexdigest()[:16]
    folder = Path(HF_HOME, "fgpt", "prepared", key)
    if not is_prepared(folder) or not read_json(folder / PREPARED)["finished"]:
        prepare(source, folder, say=say)
    return folder


def recipe_of(source: TextSource, shards: Sequence[Shard]) -> dict[str, Any]:
    """All that rows follow from."""
    names = "\n".join(shard.name for shard in shards)
    return {
        "format": FORMAT_VERSION,
        "tokenizer": tokenizer_fingerprint(),
        "row_length": source.max_position_embeddings,
        "validation_fraction": source.validation_fraction,
        "dataset_name": source.dataset_name,
        "dataset_config_name": source.dataset_config_name,
        "text_column_name": source.text_column_name,
        "shards": hashlib.sha256(names.encode()).hexdigest(),
    }


def packing_report(records: Sequence[ShardRecord]) -> str:
    """What became of the documents, and what other packings would have made of the first of them."""
    lines = []
    for split in SPLITS:
        rows, documents, tokens, padding = (
            total_tokens(records, name, split) for name in ("rows", "documents", "tokens", "padding")
        )
        lines.append(f"{split}: {documents:,} documents in {rows:,} rows: {PackingStats(tokens, 0, padding)}")
    first = records[0].accounts
    lines.append("on the first window of them, each packing:")
    lines += [f"  {name:<35} {PackingStats(*account)}" for name, account in first.items()]
    return "\n".join(lines)


def _new_shards(
    folder: Path,
    records: Sequence[ShardRecord],
    tokenising: TokenizerPool,
    shards: Sequence[Shard],
    max_train_tokens: int | None,
) -> Iterator[ShardRecord]:
    """Write the shards after those that are whole."""
    number, tokens = len(records), total_tokens(records, "tokens", TRAIN)
    start = records[-1].end if records else epoch_start()
    assert start is not None
    with closing(tokenising.windows(shards, start)) as windows:
        while start is not None:
            with atomic_directory(folder / shard_name(number)) as partial:
                record = _write_shard(partial, windows, tokenising.row_length, tokens, max_train_tokens)
            yield record
            number, tokens, start = number + 1, tokens + record.tokens[TRAIN], record.end
            if _is_enough(tokens, max_train_tokens):
                return


def _write_shard(
    folder: Path, windows: Iterator[PackedBuffer], row_length: int, tokens: int, max_train_tokens: int | None
) -> ShardRecord:
    record = ShardRecord()
    schema = pyarrow.schema({COLUMN: pyarrow.list_(pyarrow.uint16(), row_length)})
    with (
        pyarrow.OSFile(str(folder / f"{TRAIN}.arrow"), "wb") as train_file,
        pyarrow.OSFile(str(folder / f"{VALIDATION}.arrow"), "wb") as validation_file,
        pyarrow.ipc.new_stream(train_file, schema) as train,
        pyarrow.ipc.new_stream(validation_file, schema) as validation,
    ):
        for window in windows:
            for split, writer in ((TRAIN, train), (VALIDATION, validation)):
                column = pyarrow.FixedSizeListArray.from_arrays(window.rows[split].ids.ravel(), row_length)
                writer.write_batch(pyarrow.record_batch([column], schema))
            record.add(window, row_length)
            if record.tokens[TRAIN] >= SHARD_TOKENS or _is_enough(tokens + record.tokens[TRAIN], max_train_tokens):
                break
        else:
            record.end = None
    write_json(folder / "shard.json", asdict(record))
    return record


def _interrupted(folder: Path, records: Sequence[ShardRecord], error: OSError) -> str:
    said = f"{folder} could not be written: {error}; free some space and run the same command again to go on"
    tokens = total_tokens(records, "tokens", TRAIN)
    return f"{said}, or with --max_train_tokens {tokens} to keep what is there" if tokens else said


def _sizes(records: Sequence[ShardRecord]) -> dict[str, dict[str, int]]:
    names = ("documents", "tokens", "rows", "padding")
    return {split: {name: total_tokens(records, name, split) for name in names} for split in SPLITS}


def _is_finished(records: Sequence[ShardRecord], max_train_tokens: int | None) -> bool:
    at_end = bool(records) and records[-1].end is None
    return at_end or _is_enough(total_tokens(records, "tokens", TRAIN), max_train_tokens)


def _is_enough(tokens: int, max_train_tokens: int | None) -> bool:
    return max_train_tokens is not None and tokens >= max_train_tokens


def _require_recipe(folder: Path, recipe: dict[str, Any]) -> None:
    if not is_prepared(folder):
        return
    recorded = read_json(folder / PREPARED)
    for name, value in recipe.items():
        if recorded.get(name) != value:
            raise UserError(
                f"{folder} holds rows prepared with {name}={recorded.get(name)}, not {name}={value}: choose another "
                "output_dir, or delete it"
            )
