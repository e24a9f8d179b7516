"""Prepare rows: tokenize documents once, into shards on a disk, for runs that then read them at no cost.

A shard holds 134 million tokens, 256 MiB. An interrupted preparation resumes at the next shard, and gives the same rows
as one that was never interrupted, with any number of workers. Preparing again checks all that is there, and replaces
what is damaged. It takes 2 bytes of disk per token, or 4 for a vocabulary of more than 65,536 tokens, and a pass over
the corpus before the first step; a run with `--streaming` needs neither.
"""

import logging
import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from huggingface_hub.constants import HF_HOME

from fgpt_hf.config.data_options import TextSource
from fgpt_hf.config.runs import Preparation
from fgpt_hf.data.corpora import Shard, open_corpus
from fgpt_hf.data.shard_records import (
    PREPARED,
    RECORD,
    FileRecord,
    Manifest,
    Recipe,
    ShardRecord,
    describe_rows,
    total_size,
)
from fgpt_hf.data.shards import (
    ANY_SHARD,
    COLUMN,
    HOW_TO_MEND,
    PreparedData,
    buffer_sizes,
    load_prepared,
    push_dataset,
    read_shard,
    shard_name,
    split_path,
    verify_content,
)
from fgpt_hf.data.splits import SPLITS, TRAIN, SplitSize, empty_split_error
from fgpt_hf.data.stream import EpochPosition, PackedBuffer, TokenizerPool
from fgpt_hf.data.validation_rule import validation_rule
from fgpt_hf.errors import UserError
from fgpt_hf.files import PARTIAL, atomic_directory, locked, remove, sha256_of, write_sealed_json
from fgpt_hf.tokenizer.document_encoder import PROJECT_ENCODER, DocumentEncoder
from fgpt_hf.wording import count_of

logger = logging.getLogger(__name__)

FORMAT_VERSION = 5  # to be raised whenever the same documents would give other rows, or the folder another form
SHARD_TOKENS = 1 << 27  # of training rows: a hundred billion tokens need fewer than a thousand files


def prepare_documents(preparation: Preparation) -> str:
    """Prepare rows as the flags of `fgpt prepare` say, and return its report.

    Raises:
        UserError: as `prepare` does, or the Hub refuses the dataset.
    """
    from fgpt_hf.model.run_tokenizer import run_tokenizer  # with torch, which the worker processes do not need

    folder = Path(preparation.output_dir)
    encoder = DocumentEncoder.of(run_tokenizer(preparation))
    records = prepare(preparation, folder, preparation.max_train_tokens, in_processes=True, encoder=encoder)
    lines = [packing_report(records, preparation.max_position_embeddings)]
    if preparation.hub_dataset_id:
        push_dataset(folder, preparation.hub_dataset_id)
        lines.append(f"train on them with --dataset_name {preparation.hub_dataset_id}")
    return "\n".join([*lines, f"train on them with --dataset_name {folder}"])


def prepare(
    source: TextSource,
    folder: Path,
    max_train_tokens: int | None = None,
    in_processes: bool = False,
    encoder: DocumentEncoder = PROJECT_ENCODER,
) -> list[ShardRecord]:
    """Make the rows of all documents, or continue to, until about `max_train_tokens` are there.

    Of processes that want the same folder, one works and the others wait. Shards that are there are checked, and a
    damaged one is made again.

    Args:
        in_processes: tokenize in processes rather than threads, which pays for much text.

    Raises:
        UserError: the corpus cannot be read; the folder holds other files, or rows of another corpus, tokenizer, length
            or split; the disk is full, in which case complete shards stay.
    """
    with locked(folder.with_name(f".{folder.name}.lock")):
        shards = open_corpus(source)
        recipe = recipe_of(source, shards, encoder)
        _require_recipe(folder, recipe)
        with _discarding_empty_folder(folder):
            records = _Preparation(source, folder, shards, recipe, in_processes, encoder).run(max_train_tokens)
            sizes = total_size(records)
            for split in SPLITS:
                if not sizes[split].rows and (split == TRAIN or source.holds_out):
                    _discard(folder)
                    raise empty_split_error(source.validation_fraction, split)
            write_sealed_json(folder / PREPARED, Manifest.of(recipe, records).as_json())
        return records


def prepared_once(source: TextSource, verify: bool = True, encoder: DocumentEncoder = PROJECT_ENCODER) -> PreparedData:
    """Return the rows of these documents from the cache, where they are prepared if they are not there.

    The folder is below `fgpt/prepared` in `HF_HOME`; documents that have changed have another one. What is missing or
    damaged in it is made again.

    Args:
        verify: as `load_prepared` has it.

    Raises:
        UserError: as `prepare` does.
    """
    key = sha256_of(repr(recipe_of(source, open_corpus(source), encoder)).encode())[:16]
    folder = Path(HF_HOME, "fgpt", "prepared", key)
    if folder.is_dir():
        try:
            return load_prepared(folder, source.max_position_embeddings, verify, encoder)
        except UserError as error:
            logger.warning("%s (done now)", error)
    prepare(source, folder, encoder=encoder)
    return load_prepared(folder, source.max_position_embeddings, verify, encoder)


def recipe_of(source: TextSource, shards: Sequence[Shard], encoder: DocumentEncoder = PROJECT_ENCODER) -> Recipe:
    """Return all that the rows of a corpus follow from."""
    return Recipe(
        format=FORMAT_VERSION,
        tokenizer=encoder.fingerprint,
        row_length=source.max_position_embeddings,
        validation_fraction=0.0 if source.validation_dataset else source.validation_fraction,
        validation_dataset=source.validation_dataset,
        dataset_name=source.dataset_name,
        dataset_config_name=source.dataset_config_name,
        text_column_name=source.text_column_name,
        shards=sha256_of("\n".join(map(_version_of, shards)).encode()),
    )


def _version_of(shard: Shard) -> str:
    repeats = "" if shard.repeats == 1 else f"*{shard.repeats}"
    return f"{shard.version}{repeats}{' held out' if shard.is_validation else ''}"


def packing_report(records: Sequence[ShardRecord], row_length: int) -> str:
    """Return a line for each split: its documents, tokens, rows and padding."""
    return "\n".join(
        f"{split}: {count_of(size.documents, 'document')}, {describe_rows(size, row_length)}"
        for split, size in total_size(records).items()
    )


class _Preparation:
    """The making of one folder's shards: keeps those that are whole, and writes the others."""

    def __init__(
        self,
        source: TextSource,
        folder: Path,
        shards: Sequence[Shard],
        recipe: Recipe,
        in_processes: bool,
        encoder: DocumentEncoder,
    ) -> None:
        self.source, self.folder, self.shards, self.recipe, self.encoder = source, folder, shards, recipe, encoder
        self.workers = source.preprocessing_num_workers or os.cpu_count() or 1
        self.in_processes = in_processes and self.workers > 1
        self.records: list[ShardRecord] = []
        self._buffers: Generator[PackedBuffer, None, None] | None = None

    def run(self, max_train_tokens: int | None) -> list[ShardRecord]:
        """Return the records of all shards, until there are enough tokens or the corpus ends."""
        for unfinished in self.folder.glob(f"*{PARTIAL}"):
            remove(unfinished)
        with ExitStack() as resources:
            pool: TokenizerPool | None = None
            while (begin := self._next_begin()) is not None:
                if (kept := self._kept(begin)) is not None:
                    self._close_buffers()
                    self.records.append(kept)
                    continue
                tokens = total_size(self.records)[TRAIN].tokens
                enough = SHARD_TOKENS if max_train_tokens is None else min(SHARD_TOKENS, max_train_tokens - tokens)
                if enough <= 0:
                    break
                if pool is None:
                    write_sealed_json(self.folder / PREPARED, Manifest(self.recipe).as_json())
                    rule = validation_rule(self.source, self.shards)
                    pool = TokenizerPool(self.source, self.workers, self.in_processes, rule, self.encoder)
                    resources.enter_context(closing(pool))
                    resources.callback(self._close_buffers)
                self._write(pool, begin, enough)
        return self.records

    def _next_begin(self) -> EpochPosition | None:
        return self.records[-1].end if self.records else EpochPosition()

    def _kept(self, begin: EpochPosition) -> ShardRecord | None:
        """Return the record of the next shard if it is there, unchanged since it was written."""
        shard = self.folder / shard_name(len(self.records))
        if not shard.exists():
            return None
        try:
            record = read_shard(shard, self.recipe, begin)
            verify_content(shard, record)
            return record
        except UserError as error:
            logger.warning("%s", str(error).replace(HOW_TO_MEND.format(shard), "it is made again"))
            remove(shard)
            return None

    def _write(self, pool: TokenizerPool, begin: EpochPosition, enough: int) -> None:
        """Write the next shard, and add its record."""
        if self._buffers is None:
            self._buffers = pool.packed_buffers(self.shards, begin)
        try:
            with atomic_directory(self.folder / shard_name(len(self.records))) as partial:
                self.records.append(
                    _write_shard(partial, self._buffers, self.recipe, begin, enough, self.encoder.dtype)
                )
        except OSError as error:
            raise UserError(_interrupted(self.folder, self.records, error)) from error
        tokens = total_size(self.records)[TRAIN].tokens
        made = count_of(len(self.records), "shard"), count_of(tokens, "token")
        logger.info("%s: %s, %s", self.folder, *made)

    def _close_buffers(self) -> None:
        if self._buffers is not None:
            self._buffers.close()
            self._buffers = None


def _write_shard(
    folder: Path,
    buffers: Iterator[PackedBuffer],
    recipe: Recipe,
    begin: EpochPosition,
    enough: int,
    dtype: np.dtype[Any],
) -> ShardRecord:
    """Write buffers until the training split has `enough` tokens, or the corpus ends."""
    schema = pyarrow.schema({COLUMN: pyarrow.list_(pyarrow.from_numpy_dtype(dtype), recipe.row_length)})
    sizes, end = dict.fromkeys(SPLITS, SplitSize()), None
    with ExitStack() as files:
        writers = {}
        for split in SPLITS:
            file = files.enter_context(pyarrow.OSFile(str(split_path(folder, split)), "wb"))
            writers[split] = files.enter_context(pyarrow.ipc.new_stream(file, schema))
        for buffer in buffers:
            for split, size in buffer_sizes(buffer).items():
                column = pyarrow.FixedSizeListArray.from_arrays(buffer.rows[split].ids.ravel(), recipe.row_length)
                writers[split].write_batch(pyarrow.record_batch([column], schema))
                sizes[split] += size
            if sizes[TRAIN].tokens >= enough:
                end = buffer.end
                break
    written = {split: FileRecord.of(split_path(folder, split)) for split in SPLITS}
    record = ShardRecord(recipe.fingerprint, begin, end, sizes, written)
    write_sealed_json(folder / RECORD, asdict(record))
    return record


def _interrupted(folder: Path, records: Sequence[ShardRecord], error: OSError) -> str:
    message = f"{folder} could not be written: {error}; free some space and run the same command again to continue"
    tokens = total_size(records)[TRAIN].tokens
    return f"{message}, or with --max_train_tokens {tokens} to keep what is there" if tokens else message


def _require_recipe(folder: Path, recipe: Recipe) -> None:
    """Raise UserError if a folder holds other files than rows of this recipe."""
    if folder.is_dir() and not (folder / PREPARED).exists():
        others = sorted(path.name for path in folder.iterdir() if not _is_ours(path))
        if others:
            raise UserError(
                f"{folder} holds other files, such as {', '.join(others[:3])}: choose an empty folder as output_dir"
            )
    found = _recipe_of_folder(folder)
    if found is None:
        foreign = [path.parent for path in folder.glob(f"{ANY_SHARD}/{RECORD}") if not _may_be_of(path, recipe)]
        if foreign:
            raise UserError(f"{foreign[0]} holds rows that were made in another way: choose another output_dir")
        return
    if found.fingerprint == recipe.fingerprint:
        return
    differing = next(name for name, value in asdict(recipe).items() if asdict(found)[name] != value)
    if differing == "shards":
        raise UserError(
            f"{folder} holds rows of {recipe.dataset_name} from before its documents changed: choose another "
            "output_dir, or delete it"
        )
    raise UserError(
        f"{folder} holds rows prepared with {differing}={getattr(found, differing)}, not "
        f"{differing}={getattr(recipe, differing)}: choose another output_dir, or delete it"
    )


def _recipe_of_folder(folder: Path) -> Recipe | None:
    """Return the recipe that a folder names, or None if it names none that can be read."""
    try:
        return Manifest.read(folder / PREPARED).recipe if (folder / PREPARED).exists() else None
    except UserError as error:
        logger.warning("%s; it is written again", error)
        return None


def _may_be_of(record: Path, recipe: Recipe) -> bool:
    """Return whether a shard's record names this recipe, or is damaged."""
    try:
        return ShardRecord.read(record).recipe == recipe.fingerprint
    except UserError:
        return True


def _is_ours(path: Path) -> bool:
    return path.match(ANY_SHARD) or path.name.endswith(PARTIAL)


@contextmanager
def _discarding_empty_folder(folder: Path) -> Iterator[None]:
    """Leave no folder behind where an error comes before the first complete shard."""
    try:
        yield
    except BaseException:
        if not list(folder.glob(ANY_SHARD)):
            _discard(folder)
        raise


def _discard(folder: Path) -> None:
    """Delete all that a preparation wrote, and the folder if nothing else is in it."""
    for path in (*folder.glob(ANY_SHARD), folder / PREPARED):
        remove(path)
    with suppress(OSError):
        folder.rmdir()
