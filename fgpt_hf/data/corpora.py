"""Which text: a name becomes shards of documents, and a hash of each document says whether it is held out."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple, Protocol, TypeAlias

import fsspec
import pyarrow
from datasets import Dataset, DatasetBuilder, IterableDataset
from datasets.data_files import DataFilesDict
from datasets.packaged_modules.parquet.parquet import Parquet
from pyarrow.parquet import ParquetFile

from fgpt_hf.config.runs import TextSource
from fgpt_hf.data.pydocs import load_pydocs
from fgpt_hf.data.sources import DatasetRegistry, find_builder
from fgpt_hf.errors import UserError

CORPORA: Mapping[str, Callable[[], Dataset]] = {"pydocs": load_pydocs}

HUB_NAMES = {"fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT")}

NAMES = DatasetRegistry("corpus", embedded=CORPORA, on_hub=HUB_NAMES)

DOCUMENTS_AT_ONCE = 1000

ShardPosition: TypeAlias = tuple[
    int, int
]  # a place in a shard: a part of it, and documents of that part that come before


class Shard(Protocol):
    """Documents in an order. `name` says which ones: it differs where they do."""

    @property
    def name(self) -> str: ...

    def read(self, mark: ShardPosition) -> Iterator[tuple[Sequence[str | None], ShardPosition]]:
        """Texts of one part, from a place on, a thousand at most at once, each time with the place after them.

        Where one reading pauses does not depend on where it began.

        Raises:
            UserError: the shard has no such column, or the column holds no text.
        """


class ParquetShard(NamedTuple):
    """A parquet file anywhere that fsspec reaches; its parts are row groups, so no place in it is far."""

    name: str
    url: str
    column: str

    def read(self, mark: ShardPosition) -> Iterator[tuple[Sequence[str | None], ShardPosition]]:
        first, skipped = mark
        with fsspec.open(self.url) as file, ParquetFile(file) as parquet:
            _require_text(self, parquet.schema_arrow)
            if skipped and skipped >= parquet.metadata.row_group(first).num_rows:
                first, skipped = first + 1, 0
            for part in range(first, parquet.num_row_groups):
                place = 0
                for batch in parquet.iter_batches(DOCUMENTS_AT_ONCE, row_groups=[part], columns=[self.column]):
                    texts = batch.column(0).to_pylist()[max(0, skipped - place) :]
                    place += len(batch)
                    if texts:
                        yield texts, (part, place)
                skipped = 0


class StreamedShard(NamedTuple):
    """A file of any other format that `datasets` reads. To find a place in it, it is read up to there."""

    name: str
    stream: IterableDataset
    column: str

    def read(self, mark: ShardPosition) -> Iterator[tuple[Sequence[str | None], ShardPosition]]:
        place = 0
        for table in self.stream.with_format("arrow").iter(DOCUMENTS_AT_ONCE):
            _require_text(self, table.schema)
            texts = table.column(self.column).to_pylist()[max(0, mark[1] - place) :]
            place += len(table)
            if texts:
                yield texts, (0, place)


class DatasetShard(NamedTuple):
    """A data set on this machine, in a random order that is always the same."""

    name: str
    dataset: Dataset
    column: str

    def read(self, mark: ShardPosition) -> Iterator[tuple[Sequence[str | None], ShardPosition]]:
        _require_text(self, self.dataset.features.arrow_schema)
        texts = self.dataset.select_columns([self.column]).shuffle(seed=0)
        start = mark[1]
        while start < len(texts):
            stop = min(start - start % DOCUMENTS_AT_ONCE + DOCUMENTS_AT_ONCE, len(texts))
            yield texts[start:stop][self.column], (0, stop)
            start = stop


def open_corpus(source: TextSource) -> Sequence[Shard]:
    """The shards of `source.dataset_name`, in the order of their names, on whatever machine.

    Raises:
        UserError: there is no such corpus or configuration, or this user may not read it, or it has no `train` split.
    """
    name, column = source.dataset_name, source.text_column_name
    if name in CORPORA:
        dataset = CORPORA[name]()
        versions = {Path(file["filename"]).parent.name for file in dataset.cache_files}
        return [DatasetShard(" ".join([name, *sorted(versions)]), dataset, column)]
    builder = find_builder(NAMES, name, source.dataset_config_name, source.dataset_revision)
    files = _train_files(builder, name)
    if isinstance(builder, Parquet):
        return in_order([ParquetShard(_version(file), file, column) for file in files])
    stream = builder.as_streaming_dataset(split="train")
    shards = [stream.shard(stream.num_shards, index) for index in range(stream.num_shards)]
    names = [_version(file) for file in files] if len(files) == len(shards) else [str(files)] * len(shards)
    return in_order([StreamedShard(name, shard, column) for name, shard in zip(names, shards, strict=True)])


def in_order(shards: Sequence[Shard]) -> Sequence[Shard]:
    """The shards in the order of their names, however they were listed."""
    return sorted(shards, key=lambda shard: shard.name)


def is_validation(text: str, validation_fraction: float) -> bool:
    """Whether a document is never trained on: the same on any machine, in any order and process."""
    return document_hash(text) < validation_fraction


def document_hash(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48


def _train_files(builder: DatasetBuilder, name: str) -> Sequence[str]:
    files = builder.config.data_files
    if not isinstance(files, DataFilesDict) or "train" not in files:
        raise UserError(f"{name!r} has no split 'train', only {', '.join(map(str, files or ())) or 'none at all'}")
    return files["train"]


def _version(file: str) -> str:
    """A file's name and, unless it is the name of a commit's file, how large it is and when it was written."""
    if not (path := Path(file)).is_file():
        return file
    return f"{file} ({path.stat().st_size} bytes, {path.stat().st_mtime_ns})"


def _require_text(shard: ParquetShard | StreamedShard | DatasetShard, schema: pyarrow.Schema) -> None:
    if shard.column not in schema.names:
        raise UserError(
            f"{shard.name} has no column {shard.column!r}: text_column_name can be one of {', '.join(schema.names)}"
        )
    kind = schema.field(shard.column).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) or pyarrow.types.is_null(kind)):
        raise UserError(f"{shard.name} holds {kind} in its column {shard.column!r}, and documents are text")
