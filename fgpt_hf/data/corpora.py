"""Open a corpus as shards of documents, each of which can be read from any position on.

A shard is one data file of a dataset on the Hub, or some files on this machine (`local_text`). Nothing is downloaded
beyond what is read: parquet files are read by row group, so any position in them is found within one group of
documents; other formats are read up to the position. An embedded corpus is one shard in memory, in a random order that
is always the same. Equal documents are left out on this machine only: a corpus on the Hub may be too large for that.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import fsspec
import pyarrow
from datasets import Dataset, DatasetBuilder, IterableDataset
from datasets.data_files import DataFilesDict
from datasets.packaged_modules.parquet.parquet import Parquet
from pyarrow.parquet import ParquetFile

from fgpt_hf.config.data_options import TextSource
from fgpt_hf.data.columns import USUAL
from fgpt_hf.data.dataset_names import MixtureEntry, chosen_rows, parse_mixture, parse_validation_names
from fgpt_hf.data.file_hashes import file_identities
from fgpt_hf.data.file_scans import ScannedFile
from fgpt_hf.data.local_files import PARQUET, is_local
from fgpt_hf.data.local_text import LocalShard, open_local
from fgpt_hf.data.positions import DOCUMENTS_AT_ONCE, ShardPosition, Texts
from fgpt_hf.data.readers import is_text
from fgpt_hf.data.sources import CORPORA, find_builder, reading_with_datasets, validation_split
from fgpt_hf.data.splits import TRAIN
from fgpt_hf.errors import UserError
from fgpt_hf.retries import reading
from fgpt_hf.wording import some_of


class Shard(Protocol):
    """Documents in a fixed order.

    Attributes:
        name: its file, or the name of an embedded corpus.
        version: text that differs wherever the documents do: a hash of the content.
        repeats: how often an epoch has each document that is trained on, on average.
        is_validation: whether all its documents are held out.
    """

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str: ...

    @property
    def repeats(self) -> float: ...

    @property
    def is_validation(self) -> bool: ...

    def read(self, start: ShardPosition) -> Iterator[Texts]:
        """Yield the texts from a position on, at most a thousand at once.

        Where the texts are divided does not depend on `start`.

        Raises:
            UserError: the shard has no such column, or the column holds no text.
        """


class ParquetShard(NamedTuple):
    """A parquet file anywhere that fsspec reaches. Its parts are row groups, so every position is found quickly."""

    name: str
    column: str | None
    version: str
    repeats: float = 1.0
    is_validation: bool = False
    local: ScannedFile | None = None

    def read(self, start: ShardPosition) -> Iterator[Texts]:
        if self.local is None:
            yield from self._read(start)
            return
        scan = self.local.scan
        left_out = {*scan.blank, *scan.equal, *scan.not_chosen}
        with ParquetFile(self.local.file.path) as parquet:
            sizes = [parquet.metadata.row_group(part).num_rows for part in range(parquet.num_row_groups)]
        for texts, (part, stop) in self._read(start):
            first = sum(sizes[:part]) + stop - len(texts)
            kept = [None if number in left_out else text for number, text in enumerate(texts, start=first)]
            yield kept, ShardPosition(part, stop)
        self.local.file.require_unchanged(self.local.digest)

    def _read(self, start: ShardPosition) -> Iterator[Texts]:
        first, skipped = start
        with fsspec.open(self.name) as file, ParquetFile(file) as parquet:
            column = text_column(self, parquet.schema_arrow)
            if skipped and skipped >= parquet.metadata.row_group(first).num_rows:
                first, skipped = first + 1, 0
            for part in range(first, parquet.num_row_groups):
                stop = 0
                for batch in parquet.iter_batches(DOCUMENTS_AT_ONCE, row_groups=[part], columns=[column]):
                    texts = batch.column(0).to_pylist()[max(0, skipped - stop) :]
                    stop += len(batch)
                    if texts:
                        yield texts, ShardPosition(part, stop)
                skipped = 0


class StreamedShard(NamedTuple):
    """A file in another format that `datasets` reads. It has one part, and is read up to the position wanted."""

    name: str
    column: str | None
    version: str
    stream: IterableDataset
    repeats: float = 1.0
    is_validation: bool = False

    def read(self, start: ShardPosition) -> Iterator[Texts]:
        stop = 0
        with reading_with_datasets(self.name):
            for table in self.stream.with_format("arrow").iter(DOCUMENTS_AT_ONCE):
                texts = table.column(text_column(self, table.schema)).to_pylist()[max(0, start.documents - stop) :]
                stop += len(table)
                if texts:
                    yield texts, ShardPosition(0, stop)


class DatasetShard(NamedTuple):
    """A dataset on this machine, in a random order that is always the same. It has one part."""

    name: str
    column: str | None
    dataset: Dataset
    repeats: float = 1.0
    is_validation: bool = False

    @property
    def version(self) -> str:
        column = text_column(self, self.dataset.features.arrow_schema)
        digest = hashlib.sha256()
        for rows in self.dataset.select_columns([column]).iter(DOCUMENTS_AT_ONCE):
            for text in rows[column]:
                encoded = (text or "").encode("utf-8", "surrogatepass")
                digest.update(f"{len(encoded)} ".encode() + encoded)
        return digest.hexdigest()

    def read(self, start: ShardPosition) -> Iterator[Texts]:
        column = text_column(self, self.dataset.features.arrow_schema)
        texts = self.dataset.select_columns([column]).shuffle(seed=0)
        begin = start.documents
        while begin < len(texts):
            stop = min(begin - begin % DOCUMENTS_AT_ONCE + DOCUMENTS_AT_ONCE, len(texts))
            yield texts[begin:stop][column], ShardPosition(0, stop)
            begin = stop


def open_corpus(source: TextSource) -> Sequence[Shard]:
    """Return the shards of `source.dataset_name` in the order of their names, the same on every machine.

    Those of `source.validation_dataset` come before them. What both name, and on this machine documents that are in
    both, is for validation only.

    Raises:
        UserError: there is no such corpus or configuration, this user may not read it, it has no split `train`, a file
            holds no text, the same is to be trained on and held out, or the network is down.

    Example:
        >>> from tempfile import mkdtemp
        >>> from pathlib import Path
        >>> path = Path(mkdtemp(), "poems.jsonl")
        >>> _ = path.write_text('{"text": "Roses are red"}\\n{"text": "Violets are blue"}\\n')
        >>> (shard,) = open_corpus(TextSource(dataset_name=str(path)))
        >>> list(shard.read(ShardPosition()))
        [(['Roses are red', 'Violets are blue'], ShardPosition(part=0, documents=2))]
    """
    entries = [(entry, False) for entry in parse_mixture(source.dataset_name)]
    entries += [(entry, True) for entry in parse_validation_names(source.validation_dataset)]
    local = [(entry, held_out) for entry, held_out in entries if is_file_name(entry.name)]
    shards: list[Shard] = list(map(_by_row_groups, open_local(local, source))) if local else []
    for entry, held_out in entries:
        if (entry, held_out) not in local:
            shards += _open_named(entry, source, held_out)
    held_out_names = {shard.name for shard in shards if shard.is_validation}
    if both := [shard.name for shard in shards if not shard.is_validation and shard.name in held_out_names]:
        raise UserError(
            f"validation_dataset={source.validation_dataset} is what is trained on ({some_of(both)}): give another, "
            "or leave it out to hold out a fraction"
        )
    return in_order(shards)


def in_order(shards: Sequence[Shard]) -> Sequence[Shard]:
    """Return the shards in the order of their names, those for validation first."""
    return sorted(shards, key=lambda shard: (not shard.is_validation, shard.name))


def is_file_name(name: str) -> bool:
    """Return whether a name stands for files on this machine, and for no known corpus."""
    return name not in CORPORA.names and is_local(name)


def _by_row_groups(shard: LocalShard) -> Shard:
    """Return a shard that is one parquet file as one whose parts are its row groups."""
    (first, *others) = shard.files
    if others or first.file.format != PARQUET:
        return shard
    column = first.scan.options.column
    return ParquetShard(shard.name, column, shard.version, shard.repeats, shard.is_validation, first)


def _open_named(entry: MixtureEntry, source: TextSource, is_validation: bool) -> Sequence[Shard]:
    """Return the shards of a known corpus, or of a dataset on the Hub."""
    name, max_rows, repeats = entry
    column = source.text_column_name
    if name in CORPORA.embedded:
        documents = CORPORA.embedded[name]()
        chosen = documents.select(chosen_rows(max_rows, len(documents)))
        return [DatasetShard(name, column, chosen, repeats, is_validation)]
    if max_rows is not None:
        raise UserError(f"{name}:{max_rows}: only embedded corpora and files on this machine can have a limit")
    builder = find_builder(CORPORA, name, source.dataset_config_name, source.dataset_revision)
    split = _split_of(builder, name, is_validation)
    files = list(_files_by_split(builder)[split])
    versions = file_identities(files)
    if isinstance(builder, Parquet):
        return [
            ParquetShard(file, column, version, repeats, is_validation)
            for file, version in zip(files, versions, strict=True)
        ]
    with reading(name), reading_with_datasets(name):
        stream = builder.as_streaming_dataset(split=split)
        streams = [stream.shard(stream.num_shards, index) for index in range(stream.num_shards)]
    if len(files) != len(streams):
        files, versions = ([", ".join(parts)] * len(streams) for parts in (files, versions))
    return [
        StreamedShard(file, column, version, part, repeats, is_validation)
        for file, version, part in zip(files, versions, streams, strict=True)
    ]


def _split_of(builder: DatasetBuilder, name: str, is_validation: bool) -> str:
    """Return the split of a dataset on the Hub that is read: `train`, or to validate one that is not trained on."""
    found = list(_files_by_split(builder))
    if not is_validation:
        if TRAIN not in found:
            raise UserError(f"{name!r} has no split 'train', only {', '.join(found) or 'none at all'}")
        return TRAIN
    return validation_split(name, found)


def _files_by_split(builder: DatasetBuilder) -> Mapping[str, Sequence[str]]:
    files = builder.config.data_files
    return {str(split): list(names) for split, names in files.items()} if isinstance(files, DataFilesDict) else {}


def text_column(shard: ParquetShard | StreamedShard | DatasetShard, schema: pyarrow.Schema) -> str:
    """Return the column of a shard's documents: the one given, or else a usual one, or else the only one of text."""
    texts = [field.name for field in schema if is_text(field.type)]
    column = shard.column or next((name for name in USUAL if name in texts), None) or (texts or [USUAL[0]])[0]
    there = f"text_column_name can be one of {', '.join(schema.names)}"
    if column not in schema.names:
        raise UserError(f"{shard.name} has no column {column!r}: {there}")
    if shard.column is None and column not in USUAL and len(texts) > 1:
        raise UserError(f"{shard.name} has several columns of text and none called {USUAL[0]}: {there}")
    if column not in texts:
        kind = schema.field(column).type
        raise UserError(f"{shard.name} holds {kind} in its column {column!r}, and documents are text")
    return column
