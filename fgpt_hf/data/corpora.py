"""Open a corpus as shards of documents, each of which can be read from any position on.

A shard is one data file of a data set on the Hub or on this machine. Nothing is downloaded beyond what is read: parquet
files are read by row group, so any position in them is found within one group of documents; other formats are read up
to the position. An embedded corpus is one shard in memory, in a random order that is always the same.
"""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import NamedTuple, Protocol, TypeAlias

import fsspec
import pyarrow
from datasets import Dataset, DatasetBuilder, IterableDataset
from datasets.data_files import DataFilesDict
from datasets.packaged_modules.parquet.parquet import Parquet
from pyarrow.parquet import ParquetFile

from fgpt_hf.config.option_groups import TextSource
from fgpt_hf.data.file_hashes import file_identities
from fgpt_hf.data.sources import CORPORA, find_builder, reading_with_datasets
from fgpt_hf.errors import UserError
from fgpt_hf.retries import reading

DOCUMENTS_AT_ONCE = 1000


class ShardPosition(NamedTuple):
    """A position in a shard: one of its parts, and the number of documents in that part before it."""

    part: int = 0
    documents: int = 0


Texts: TypeAlias = tuple[Sequence[str | None], ShardPosition]  # of one part of a shard, and the position after them


class Shard(Protocol):
    """Documents in a fixed order.

    Attributes:
        name: its file, or the name of an embedded corpus.
        version: text that differs wherever the documents do: a hash of the content.
    """

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str: ...

    def read(self, start: ShardPosition) -> Iterator[Texts]:
        """Yield the texts from a position on, at most a thousand at once.

        Where the texts are divided does not depend on `start`.

        Raises:
            UserError: the shard has no such column, or the column holds no text.
        """


class ParquetShard(NamedTuple):
    """A parquet file anywhere that fsspec reaches. Its parts are row groups, so every position is found quickly."""

    name: str
    column: str
    version: str

    def read(self, start: ShardPosition) -> Iterator[Texts]:
        first, skipped = start
        with fsspec.open(self.name) as file, ParquetFile(file) as parquet:
            _require_text(self, parquet.schema_arrow)
            if skipped and skipped >= parquet.metadata.row_group(first).num_rows:
                first, skipped = first + 1, 0
            for part in range(first, parquet.num_row_groups):
                stop = 0
                for batch in parquet.iter_batches(DOCUMENTS_AT_ONCE, row_groups=[part], columns=[self.column]):
                    texts = batch.column(0).to_pylist()[max(0, skipped - stop) :]
                    stop += len(batch)
                    if texts:
                        yield texts, ShardPosition(part, stop)
                skipped = 0


class StreamedShard(NamedTuple):
    """A file in another format that `datasets` reads. It has one part, and is read up to the position wanted."""

    name: str
    column: str
    version: str
    stream: IterableDataset

    def read(self, start: ShardPosition) -> Iterator[Texts]:
        stop = 0
        with reading_with_datasets(self.name):
            for table in self.stream.with_format("arrow").iter(DOCUMENTS_AT_ONCE):
                _require_text(self, table.schema)
                texts = table.column(self.column).to_pylist()[max(0, start.documents - stop) :]
                stop += len(table)
                if texts:
                    yield texts, ShardPosition(0, stop)


class DatasetShard(NamedTuple):
    """A data set on this machine, in a random order that is always the same. It has one part."""

    name: str
    column: str
    dataset: Dataset

    @property
    def version(self) -> str:
        _require_text(self, self.dataset.features.arrow_schema)
        digest = hashlib.sha256()
        for rows in self.dataset.select_columns([self.column]).iter(DOCUMENTS_AT_ONCE):
            for text in rows[self.column]:
                encoded = (text or "").encode("utf-8", "surrogatepass")
                digest.update(f"{len(encoded)} ".encode() + encoded)
        return digest.hexdigest()

    def read(self, start: ShardPosition) -> Iterator[Texts]:
        _require_text(self, self.dataset.features.arrow_schema)
        texts = self.dataset.select_columns([self.column]).shuffle(seed=0)
        begin = start.documents
        while begin < len(texts):
            stop = min(begin - begin % DOCUMENTS_AT_ONCE + DOCUMENTS_AT_ONCE, len(texts))
            yield texts[begin:stop][self.column], ShardPosition(0, stop)
            begin = stop


def open_corpus(source: TextSource) -> Sequence[Shard]:
    """Return the shards of `source.dataset_name` in the order of their names, the same on every machine.

    Raises:
        UserError: there is no such corpus or configuration, this user may not read it, it has no split `train`, or the
            network is down.

    Example:
        >>> from tempfile import mkdtemp
        >>> from pathlib import Path
        >>> path = Path(mkdtemp(), "poems.txt")
        >>> _ = path.write_text("Roses are red\\n\\nViolets are blue")
        >>> (shard,) = open_corpus(TextSource(dataset_name=str(path)))
        >>> list(shard.read(ShardPosition()))
        [(['Roses are red', 'Violets are blue'], ShardPosition(part=0, documents=2))]
    """
    name, column = source.dataset_name, source.text_column_name
    if name in CORPORA.embedded:
        return [DatasetShard(name, column, CORPORA.embedded[name]())]
    builder = find_builder(CORPORA, name, source.dataset_config_name, source.dataset_revision)
    files = _train_files(builder, name)
    versions = file_identities(files)
    if isinstance(builder, Parquet):
        return in_order(list(map(ParquetShard, files, repeat(column), versions)))
    with reading(name), reading_with_datasets(name):
        stream = builder.as_streaming_dataset(split="train")
        streams = [stream.shard(stream.num_shards, index) for index in range(stream.num_shards)]
    if len(files) != len(streams):
        files, versions = ([", ".join(parts)] * len(streams) for parts in (files, versions))
    return in_order(list(map(StreamedShard, files, repeat(column), versions, streams)))


def in_order(shards: Sequence[Shard]) -> Sequence[Shard]:
    """Return the shards in the order of their names."""
    return sorted(shards, key=lambda shard: shard.name)


def _train_files(builder: DatasetBuilder, name: str) -> Sequence[str]:
    files = builder.config.data_files
    if not isinstance(files, DataFilesDict) or "train" not in files:
        raise UserError(f"{name!r} has no split 'train', only {', '.join(map(str, files or ())) or 'none at all'}")
    return list(files["train"])


def _require_text(shard: ParquetShard | StreamedShard | DatasetShard, schema: pyarrow.Schema) -> None:
    if shard.column not in schema.names:
        raise UserError(
            f"{shard.name} has no column {shard.column!r}: text_column_name can be one of {', '.join(schema.names)}"
        )
    kind = schema.field(shard.column).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) or pyarrow.types.is_null(kind)):
        raise UserError(f"{shard.name} holds {kind} in its column {shard.column!r}, and documents are text")
