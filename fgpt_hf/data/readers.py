"""Read the documents or the rows of a file on this machine.

A file of text, HTML or PDF is one document, unless a separator divides it. Other formats hold rows, of which only the
columns that are asked for are read: the others may hold anything.
"""

import csv
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, TextIO

import pyarrow
import pyarrow.ipc
from pyarrow.parquet import ParquetFile

from fgpt_hf.data.encodings import CHUNK, open_text
from fgpt_hf.data.extracted_text import text_of_html, text_of_pdf
from fgpt_hf.data.json_rows import Row, json_rows, kind_of
from fgpt_hf.data.local_files import ARROW, CSV, HTML, JSON, PARQUET, PDF, LocalFile
from fgpt_hf.errors import UserError

ROWS_AT_ONCE = 1000
ENDOFTEXT = re.compile(r"(?m)^[ \t]*<\|endoftext\|>[ \t]*$")  # between stories, as TinyStories has it


@dataclass(frozen=True)
class ReadOptions:
    """How a file is read.

    Attributes:
        encoding: that of its text; Parquet, Arrow and PDF have none.
        column: the column of the documents, if it has rows.
        separator: the text between documents; None means lines of `<|endoftext|>`.
    """

    encoding: str = "utf-8"
    column: str | None = None
    separator: str | None = None


def read_documents(file: LocalFile, options: ReadOptions, start: int = 0) -> Iterator[str | None]:
    """Yield the documents of a file from the one numbered `start` on, None where a row holds none.

    Raises:
        UserError: the file is damaged, its column holds something other than text, or a library is missing.
    """
    if options.column is None:
        yield from islice(_whole_texts(file, options), start, None)
        return
    rows = read_rows(file, options.encoding, [options.column], start)
    for number, row in enumerate(rows, start=start + 1):
        text = row.get(options.column) if row else None
        if text is not None and not isinstance(text, str):
            raise UserError(
                f"{file.path} holds {kind_of(text)} in its column {options.column!r} (row {number:,}), and documents "
                "are text"
            )
        yield text


def read_rows(
    file: LocalFile, encoding: str, columns: Sequence[str] | None = None, start: int = 0
) -> Iterator[Row | None]:
    """Yield the rows of a file from the one numbered `start` on; None for an empty line.

    Args:
        columns: those to read where a format can leave others out; the rest of a row does not matter.

    Raises:
        UserError: the file is damaged, or something in it is not a row.
    """
    with _damage_explained(file):
        if file.format == PARQUET:
            yield from _parquet_rows(file, columns, start)
        elif file.format == ARROW:
            yield from islice(_arrow_rows(file, columns), start, None)
        elif file.format == CSV:
            yield from islice(_csv_rows(file, encoding), start, None)
        elif file.format == JSON:
            yield from json_rows(file, encoding, start)


def text_columns(file: LocalFile, encoding: str) -> tuple[list[str], list[str]]:
    """Return all columns of a file, and those that hold text, by their types or the first thousand rows."""
    with _damage_explained(file):
        if file.format in (PARQUET, ARROW):
            schema = _schema(file)
            return list(schema.names), [field.name for field in schema if is_text(field.type)]
    columns: dict[str, list[str]] = {}
    for row in islice(read_rows(file, encoding), ROWS_AT_ONCE):
        for name, value in (row or {}).items():
            columns.setdefault(name, []).extend([value] if isinstance(value, str) and value.strip() else [])
    return list(columns), [name for name, values in columns.items() if values]


def sample_of(file: LocalFile, encoding: str, column: str) -> list[str]:
    """Return the texts in a column of the first thousand rows."""
    rows = islice(read_rows(file, encoding, [column]), ROWS_AT_ONCE)
    return [row[column] for row in rows if row and isinstance(row.get(column), str)]


def is_text(kind: pyarrow.DataType) -> bool:
    """Return whether an Arrow type is text: a string, a view of one, or a category of strings.

    Example:
        >>> is_text(pyarrow.dictionary(pyarrow.int8(), pyarrow.string())), is_text(pyarrow.int64())
        (True, False)
    """
    if pyarrow.types.is_dictionary(kind):
        return is_text(kind.value_type)
    types = pyarrow.types
    tests = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
    return any(test(kind) for test in tests)


# Whole texts


def _whole_texts(file: LocalFile, options: ReadOptions) -> Iterator[str]:
    with _damage_explained(file):
        if file.format == PDF:
            yield text_of_pdf(file)
        elif file.format == HTML:
            yield text_of_html(file, options.encoding)
        else:
            with open_text(file, options.encoding) as text:
                yield from split_text(text, options.separator)


def split_text(text: TextIO, separator: str | None) -> Iterator[str]:
    r"""Yield the documents between separators, without line ends around them; without a separator, the text as it is.

    Args:
        separator: the text between documents; None means lines of `<|endoftext|>`.

    Example:
        >>> import io
        >>> list(split_text(io.StringIO("One.\n<|endoftext|>\nTwo.\n<|endoftext|>\n"), None))
        ['One.', 'Two.']
        >>> list(split_text(io.StringIO("One.\n***\nTwo."), "***"))
        ['One.', 'Two.']
        >>> list(split_text(io.StringIO("One.\n"), None))
        ['One.\n']
    """
    parts: list[str] = []
    is_divided = False
    for piece, ends in _pieces(text, separator):
        parts.append(piece)
        if ends:
            is_divided = True
            if document := "".join(parts).strip("\n"):
                yield document
            parts = []
    last = "".join(parts)
    if not is_divided:
        yield last
    elif last.strip():
        yield last.strip("\n")


def _pieces(text: TextIO, separator: str | None) -> Iterator[tuple[str, bool]]:
    """Yield the text in pieces, each with whether a separator follows it."""
    kept = ""
    while chunk := text.read(CHUNK):
        if separator is None:
            *ended, rest = ENDOFTEXT.split(chunk + text.readline())
        else:
            *ended, rest = (kept + chunk).split(separator)
            held = len(rest) - (len(separator) - 1)  # what follows may be the beginning of a separator
            rest, kept = (rest[:held], rest[held:]) if held > 0 else ("", rest)
        yield from ((piece, True) for piece in ended)
        yield rest, False
    yield kept, False


# Rows


def _parquet_rows(file: LocalFile, columns: Sequence[str] | None, start: int) -> Iterator[Row]:
    with ParquetFile(file.path) as parquet:
        for group in range(parquet.num_row_groups):
            count = parquet.metadata.row_group(group).num_rows
            if start >= count:
                start -= count
                continue
            wanted = _existing(columns, parquet.schema_arrow)
            for batch in parquet.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=wanted):
                yield from islice(batch.to_pylist(), min(start, len(batch)), None)
                start = max(0, start - len(batch))


def _arrow_rows(file: LocalFile, columns: Sequence[str] | None) -> Iterator[Row]:
    with pyarrow.memory_map(str(file.path)) as source, _open_arrow(source) as reader:
        batches: Iterable[pyarrow.RecordBatch] = (
            map(reader.get_batch, range(reader.num_record_batches)) if hasattr(reader, "get_batch") else reader
        )
        for batch in batches:
            wanted = batch.select(_existing(columns, batch.schema))
            for begin in range(0, len(wanted), ROWS_AT_ONCE):
                yield from wanted.slice(begin, ROWS_AT_ONCE).to_pylist()


def _open_arrow(source: pyarrow.NativeFile) -> Any:
    """Return a reader of an Arrow file, or of an Arrow stream, as `datasets` writes it."""
    try:
        return pyarrow.ipc.open_file(source)
    except pyarrow.ArrowInvalid:
        source.seek(0)
        return pyarrow.ipc.open_stream(source)


def _existing(columns: Sequence[str] | None, schema: pyarrow.Schema) -> list[str]:
    return [name for name in schema.names if columns is None or name in columns]


def _schema(file: LocalFile) -> pyarrow.Schema:
    if file.format == PARQUET:
        with ParquetFile(file.path) as parquet:
            return parquet.schema_arrow
    with pyarrow.memory_map(str(file.path)) as source, _open_arrow(source) as reader:
        return reader.schema


def no_header(file: LocalFile) -> UserError:
    """Return the error of a CSV file whose first line names no columns."""
    return UserError(f"{file.path} has no header: its first line should name the columns, such as text")


def _csv_rows(file: LocalFile, encoding: str) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    with open_text(file, encoding, newline="") as text:
        header = text.readline()
        if not header.strip():
            raise no_header(file)
        delimiter = max("\t,;", key=header.count) if any(mark in header for mark in "\t,;") else ","
        names = next(csv.reader([header], delimiter=delimiter))
        yield from csv.DictReader(text, fieldnames=[name.strip() for name in names], delimiter=delimiter)


@contextmanager
def _damage_explained(file: LocalFile) -> Iterator[None]:
    """Convert what the readers raise about damaged content to a UserError."""
    try:
        yield
    except (csv.Error, pyarrow.ArrowException) as error:
        raise UserError(f"{file.path} cannot be read, it may be damaged: {str(error).splitlines()[0]}") from error
