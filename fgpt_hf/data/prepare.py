"""Prepare rows: tokenize documents once, into shards on a disk, for runs that then read them at no cost.

A shard holds 134 million tokens, 256 MiB. An interrupted preparation resumes at the next shard, and gives the same rows
as one that was never interrupted, with any number of workers. Preparing again checks all that is there, and replaces
what is damaged. It takes 2 bytes of disk per token, or 4 for a vocabulary of more than 65,536 tokens, and a pass over
the corpus before the first step; a run with `--streaming` needs neither.
"""

import logging
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from huggingface_hub.constants import HF_HOME

from fgpt_hf.config.data_options import TextSource
from fgpt_hf.config.runs import Preparation
from fgpt_hf.data.corpora import Shard, open_corpus
from fgpt_hf.data.shard_records import (
    PREPARED,
    RECORD,
    Manifest,
    Recipe,
    ShardRecord,
    describe_rows,
    total_size,
)
from fgpt_hf.data.shard_writer import ShardWriter
from fgpt_hf.data.shards import (
    ANY_SHARD,
    PreparedData,
    load_prepared,
    push_dataset,
)
from fgpt_hf.data.splits import SPLITS, TRAIN, empty_split_error
from fgpt_hf.errors import UserError
from fgpt_hf.files import PARTIAL, locked, remove, sha256_of, write_sealed_json
from fgpt_hf.tokenizer.document_encoder import PROJECT_ENCODER, DocumentEncoder
from fgpt_hf.wording import count_of

logger = logging.getLogger(__name__)

FORMAT_VERSION = 5  # to be raised whenever the same documents would give other rows, or the folder another form


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
    return "\n".join([*lines, f"train on them with --dataset_name {shlex.quote(str(folder))}"])


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
            records = ShardWriter(source, folder, shards, recipe, in_processes, encoder).run(max_train_tokens)
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
