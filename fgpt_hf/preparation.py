"""Rows that are made once: folders of token ids that map into memory, and data sets on the Hub made of them.

A prepared folder holds `prepared.json`, which says what the rows are made of and how, and `shard-00000/` and so on,
each with `train.arrow`, `validation.arrow` and `shard.json`. A shard is whole or not there; the next one begins where
it ends, so an interrupted preparation goes on with the first one that is missing.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from datasets import Dataset, DatasetDict, concatenate_datasets
from filelock import FileLock
from huggingface_hub import HfApi
from huggingface_hub.constants import HF_HOME

from fgpt_hf.corpora import Shard, open_corpus
from fgpt_hf.folders import whole_folder
from fgpt_hf.packing import Account, Ids, accounts
from fgpt_hf.retries import patiently
from fgpt_hf.rows import HELD_OUT, SPLITS, TRAIN, PackedWindow, Tokenising, no_rows
from fgpt_hf.runs import Preparation, TextSource
from fgpt_hf.tokenizer import tokenizer_fingerprint
from fgpt_hf.windows import Position, epoch_start

PREPARED = "prepared.json"
FORMAT_VERSION = 1  # to be raised whenever the same documents would give other rows
SHARD_TOKENS = 1 << 27  # of training rows: 256 MiB, of which a hundred billion tokens need fewer than a thousand files
COLUMN = "input_ids"


@dataclass
class ShardRecord:
    """What a shard holds, by split, and where in the corpus it ends: None at the end of the corpus."""

    end: Position | None = None
    rows: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    documents: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    padding: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    accounts: dict[str, list[int]] = field(default_factory=dict)  # of the corpus's first window, by packing

    def add(self, window: PackedWindow, row_length: int) -> None:
        for split in SPLITS:
            self.rows[split] += len(window.rows[split].ids)
            self.documents[split] += len(window.lengths[split])
            self.tokens[split] += window.rows[split].tokens
            self.padding[split] += window.rows[split].padding
        self.end = window.end
        if window.begin["window"] == 0:
            self.accounts = {
                name: list(account) for name, account in accounts(window.lengths[TRAIN], row_length).items()
            }


class PreparedRows:
    """The rows of a prepared folder or data set, mapped into memory."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset.with_format("numpy")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, numbers: Sequence[int]) -> Ids:
        return np.asarray(self.dataset[numbers][COLUMN], dtype=np.uint16)


def prepare_documents(preparation: Preparation) -> str:
    """What `fgpt prepare` does; returns what it says in the end."""
    folder = Path(preparation.output_dir)
    records = prepare(preparation, folder, preparation.max_train_tokens, in_processes=True)
    said = report(records)
    if preparation.hub_dataset_id:
        push(folder, preparation.hub_dataset_id)
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
        ValueError: the corpus cannot be read; the folder holds rows of another corpus, tokenizer, length or split.
        OSError: no space; the shards that are whole stay.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        shards = open_corpus(source)
        recipe = describe(source, shards)
        _require_recipe(folder, recipe)
        records = _whole_shards(folder)
        if not _is_finished(records, max_train_tokens):
            _write_json(folder / PREPARED, {**recipe, "finished": False})
            workers = source.preprocessing_num_workers or os.cpu_count() or 1
            try:
                with closing(Tokenising(source, workers, in_processes=in_processes and workers > 1)) as tokenising:
                    for record in _new_shards(folder, records, tokenising, shards, max_train_tokens):
                        records.append(record)
                        say(f"{folder}: {len(records)} shards, {_total(records, 'tokens', TRAIN):,} tokens")
            except OSError as error:
                raise OSError(_interrupted(folder, records, error)) from error
        for split in SPLITS:
            if not _total(records, "rows", split):
                raise no_rows(source.held_out_share, split)
        _write_json(folder / PREPARED, {**recipe, "finished": True, "sizes": _sizes(records)})
        return records


def prepared_once(source: TextSource, say: Callable[[str], None]) -> Path:
    """The folder in the cache (`fgpt/prepared` in `HF_HOME`) that holds the rows of these documents as they are now."""
    key = hashlib.sha256(json.dumps(describe(source, open_corpus(source))).encode()).hexdigest()[:16]
    folder = Path(HF_HOME, "fgpt", "prepared", key)
    if not is_prepared(folder) or not _read_json(folder / PREPARED)["finished"]:
        prepare(source, folder, say=say)
    return folder


def describe(source: TextSource, shards: Sequence[Shard]) -> dict[str, Any]:
    """All that rows follow from."""
    names = "\n".join(shard.name for shard in shards)
    return {
        "format": FORMAT_VERSION,
        "tokenizer": tokenizer_fingerprint(),
        "row_length": source.max_position_embeddings,
        "held_out_share": source.held_out_share,
        "dataset_name": source.dataset_name,
        "dataset_config_name": source.dataset_config_name,
        "text_column_name": source.text_column_name,
        "shards": hashlib.sha256(names.encode()).hexdigest(),
    }


def is_prepared(folder: Path) -> bool:
    return (folder / PREPARED).is_file()


def summary(recipe: dict[str, Any]) -> str:
    """What finished rows hold, from what `prepared.json` says of them."""
    train, length = recipe["sizes"][TRAIN], recipe["row_length"]
    share = train["padding"] / (train["rows"] * length)
    return (
        f"{train['documents']:,} documents of {recipe['dataset_name']}, {train['tokens']:,} tokens in "
        f"{train['rows']:,} rows of {length}: none lost, {share:.2%} padding"
    )


def origin(recipe: dict[str, Any]) -> dict[str, Any]:
    """What finished rows were made of: `source`, the text, and `data`, its documents, tokens and rows by split."""
    source = {name: recipe[name] for name in ("dataset_name", "dataset_config_name", "held_out_share")}
    return {"source": source, "data": recipe["sizes"]}


def load_prepared(folder: Path, row_length: int) -> tuple[dict[str, PreparedRows], dict[str, Any]]:
    """The rows of a prepared folder by split, and the content of its `prepared.json`.

    Raises:
        ValueError: they are of another tokenizer or length; a shard is damaged; the preparation is not finished.
    """
    recipe = _read_json(folder / PREPARED)
    require_fitting(str(folder), recipe, row_length)
    records = _whole_shards(folder)
    if not recipe["finished"]:
        tokens = _total(records, "tokens", TRAIN)
        raise ValueError(
            f"the preparation of {folder} is not finished: run `fgpt prepare` again to go on, or keep the {tokens:,} "
            f"tokens that are there with --max_train_tokens {tokens}"
        )
    return {split: PreparedRows(_split(folder, len(records), split)) for split in SPLITS}, recipe


def require_fitting(name: str, recipe: dict[str, Any], row_length: int) -> None:
    """Raise ValueError if rows are of another tokenizer or length than a run."""
    if recipe["tokenizer"] != tokenizer_fingerprint():
        raise ValueError(f"{name} was prepared with another tokenizer than GPT-2's with FGPT's control tokens")
    if recipe["row_length"] != row_length:
        raise ValueError(
            f"{name} holds rows of {recipe['row_length']} tokens and max_position_embeddings={row_length}: give "
            f"--max_position_embeddings {recipe['row_length']}, or prepare the documents for {row_length}"
        )


def push(folder: Path, repo_id: str) -> None:
    """Make the rows of a folder a data set on the Hub, as `train_base.py --dataset_name REPO_ID` takes it.

    Raises:
        OSError: the Hub refuses it, or cannot be reached.
    """
    count = len(_whole_shards(folder))
    rows = DatasetDict({split: _split(folder, count, split) for split in SPLITS})
    patiently(repo_id, lambda: rows.push_to_hub(repo_id))
    recipe = (folder / PREPARED).read_bytes()
    patiently(
        repo_id,
        lambda: HfApi().upload_file(
            path_or_fileobj=recipe, path_in_repo=PREPARED, repo_id=repo_id, repo_type="dataset"
        ),
    )


def report(records: Sequence[ShardRecord]) -> str:
    """What became of the documents, and what other packings would have made of the first of them."""
    lines = []
    for split in SPLITS:
        rows, documents, tokens, padding = (
            _total(records, name, split) for name in ("rows", "documents", "tokens", "padding")
        )
        lines.append(f"{split}: {documents:,} documents in {rows:,} rows: {Account(tokens, 0, padding)}")
    first = records[0].accounts
    lines.append("on the first window of them, each packing:")
    lines += [f"  {name:<35} {Account(*account)}" for name, account in first.items()]
    return "\n".join(lines)


def _new_shards(
    folder: Path,
    records: Sequence[ShardRecord],
    tokenising: Tokenising,
    shards: Sequence[Shard],
    max_train_tokens: int | None,
) -> Iterator[ShardRecord]:
    """Write the shards after those that are whole."""
    number, tokens = len(records), _total(records, "tokens", TRAIN)
    start = records[-1].end if records else epoch_start()
    assert start is not None
    with closing(tokenising.windows(shards, start)) as windows:
        while start is not None:
            with whole_folder(folder / _name(number)) as partial:
                record = _write_shard(partial, windows, tokenising.row_length, tokens, max_train_tokens)
            yield record
            number, tokens, start = number + 1, tokens + record.tokens[TRAIN], record.end
            if _is_enough(tokens, max_train_tokens):
                return


def _write_shard(
    folder: Path, windows: Iterator[PackedWindow], row_length: int, tokens: int, max_train_tokens: int | None
) -> ShardRecord:
    record = ShardRecord()
    schema = pyarrow.schema({COLUMN: pyarrow.list_(pyarrow.uint16(), row_length)})
    with (
        pyarrow.OSFile(str(folder / f"{TRAIN}.arrow"), "wb") as train_file,
        pyarrow.OSFile(str(folder / f"{HELD_OUT}.arrow"), "wb") as held_out_file,
        pyarrow.ipc.new_stream(train_file, schema) as train,
        pyarrow.ipc.new_stream(held_out_file, schema) as held_out,
    ):
        for window in windows:
            for split, writer in ((TRAIN, train), (HELD_OUT, held_out)):
                column = pyarrow.FixedSizeListArray.from_arrays(window.rows[split].ids.ravel(), row_length)
                writer.write_batch(pyarrow.record_batch([column], schema))
            record.add(window, row_length)
            if record.tokens[TRAIN] >= SHARD_TOKENS or _is_enough(tokens + record.tokens[TRAIN], max_train_tokens):
                break
        else:
            record.end = None
    _write_json(folder / "shard.json", asdict(record))
    return record


def _whole_shards(folder: Path) -> list[ShardRecord]:
    """The shards from the first one on, up to one that is missing or to the end of the corpus."""
    records: list[ShardRecord] = []
    while (path := folder / _name(len(records)) / "shard.json").is_file():
        records.append(ShardRecord(**_read_json(path)))
        if records[-1].end is None:
            break
    return records


def _interrupted(folder: Path, records: Sequence[ShardRecord], error: OSError) -> str:
    said = f"{folder} could not be written: {error}; free some space and run the same command again to go on"
    tokens = _total(records, "tokens", TRAIN)
    return f"{said}, or with --max_train_tokens {tokens} to keep what is there" if tokens else said


def _sizes(records: Sequence[ShardRecord]) -> dict[str, dict[str, int]]:
    names = ("documents", "tokens", "rows", "padding")
    return {split: {name: _total(records, name, split) for name in names} for split in SPLITS}


def _is_finished(records: Sequence[ShardRecord], max_train_tokens: int | None) -> bool:
    at_end = bool(records) and records[-1].end is None
    return at_end or _is_enough(_total(records, "tokens", TRAIN), max_train_tokens)


def _is_enough(tokens: int, max_train_tokens: int | None) -> bool:
    return max_train_tokens is not None and tokens >= max_train_tokens


def _total(records: Sequence[ShardRecord], name: str, split: str) -> int:
    return sum(getattr(record, name)[split] for record in records)


def _split(folder: Path, count: int, split: str) -> Dataset:
    paths = [folder / _name(number) / f"{split}.arrow" for number in range(count)]
    datasets = []
    for path in paths:
        try:
            datasets.append(Dataset.from_file(str(path)))
        except (OSError, pyarrow.ArrowInvalid) as error:
            raise ValueError(f"{path} is damaged: delete {path.parent} and run `fgpt prepare` again") from error
    return concatenate_datasets(datasets)


def _require_recipe(folder: Path, recipe: dict[str, Any]) -> None:
    if not is_prepared(folder):
        return
    recorded = _read_json(folder / PREPARED)
    for name, value in recipe.items():
        if recorded.get(name) != value:
            raise ValueError(
                f"{folder} holds rows prepared with {name}={recorded.get(name)}, not {name}={value}: choose another "
                "output_dir, or delete it"
            )


def _name(number: int) -> str:
    return f"shard-{number:05d}"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    replacement = path.with_suffix(".new")
    replacement.write_text(json.dumps(content, indent=1), encoding="utf-8")
    replacement.replace(path)
