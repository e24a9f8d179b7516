"""Read the rows of a JSON file: of lines, or of one value in any usual form.

A row is an object. A text stands for a document, a list of messages for a conversation, and an object of columns, as
pandas writes it, for the rows of these columns.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any

import orjson

from fgpt_hf.data.encodings import UTF_8, open_bytes, open_text
from fgpt_hf.data.local_files import LocalFile
from fgpt_hf.errors import UserError

Row = dict[str, Any]


def json_rows(file: LocalFile, encoding: str, start: int) -> Iterator[Row | None]:
    """Yield the rows of a file from the one numbered `start` on; None for an empty line.

    Raises:
        UserError: the file is damaged, or something in it is not a row.
    """
    with _json_lines(file, encoding) as lines:
        first, second = next(lines, None), next(lines, None)
        if first is not None and second is not None and _is_row(first):
            rows = islice(chain([first, second], lines), start, None)
            for number, line in enumerate(rows, start=start + 1):
                yield _row_of_line(line, f"{file.path} cannot be read: line {number:,}") if line.strip() else None
            return
    if first is not None:
        yield from islice(_rows_of_value(file, encoding), start, None)


@contextmanager
def _json_lines(file: LocalFile, encoding: str) -> Iterator[Iterator[bytes] | Iterator[str]]:
    if encoding in UTF_8:
        with open_bytes(file) as content:
            if encoding != "utf-8":
                content.read(3)  # the byte order mark
            yield content
    else:
        with open_text(file, encoding, newline="\n") as text:
            yield text


def _is_row(line: bytes | str) -> bool:
    """Return whether the first of several lines is a row, and not the beginning of a value that fills the file."""
    try:
        value = _parse(line)
    except ValueError:
        return line.strip()[:1] not in (b"[", b"{", "[", "{")
    return not isinstance(value, list) or _is_messages(value)


def _row_of_line(line: bytes | str, where: str) -> Row:
    try:
        value = _parse(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON, it may be cut short: {error}") from error
    return _row_of(value, where)


def _rows_of_value(file: LocalFile, encoding: str) -> Iterator[Row]:
    with open_text(file, encoding) as text:
        content = text.read()
    try:
        value = _parse(content)
    except ValueError as error:
        raise UserError(f"{file.path} cannot be read, it may be damaged: {error}") from error
    if isinstance(value, dict):
        lists = [each for each in value.values() if isinstance(each, list)]
        is_wrapped = len(lists) == 1 and all(isinstance(each, dict) for each in lists[0]) and not _is_messages(lists[0])
        value = lists[0] if is_wrapped else _rows_of_columns(value)
    if _is_messages(value) or not isinstance(value, list):
        value = [value]
    for number, each in enumerate(value, start=1):
        yield _row_of(each, f"{file.path} cannot be read: item {number:,}")


def _rows_of_columns(value: Row) -> list[Row]:
    """Return the rows of an object of columns, as pandas writes them; any other object is a row."""
    columns = list(value.values())
    if columns and all(isinstance(column, dict) for column in columns):
        keys = list(columns[0])
        if all(list(column) == keys for column in columns):
            return [{name: column[key] for name, column in value.items()} for key in keys]
    if columns and all(isinstance(column, list) and not _is_messages(column) for column in columns):
        return [dict(zip(value, cells, strict=False)) for cells in zip(*columns, strict=False)]
    return [value]


def _parse(line: bytes | str) -> Any:
    """Return the value of a JSON text; ValueError if it is none, or is nested without end."""
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:  # it may still be what Python reads: NaN, or half of a surrogate pair
        try:
            return json.loads(line)
        except RecursionError as error:
            raise ValueError("it is nested too deeply") from error


def _is_messages(value: object) -> bool:
    """Return whether a value is a list of messages, in any usual form.

    Example:
        >>> _is_messages([{"role": "user", "content": "Hi"}]), _is_messages([{"text": "Hi"}])
        (True, False)
    """
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(each, dict) and ("role" in each or "from" in each) for each in value)
    )


def _row_of(value: object, where: str) -> Row:
    """Return a row: an object as it is, text as a document, and a list of messages as a conversation."""
    if isinstance(value, dict):
        return value
    if isinstance(value, str):
        return {"text": value}
    if _is_messages(value):
        return {"messages": value}
    raise UserError(f"{where} is {kind_of(value)}, and not a row")


def kind_of(value: object) -> str:
    """Return what a JSON value is, in words.

    Example:
        >>> kind_of([1, 2]), kind_of(None)
        ('a list', 'null')
    """
    names = {bool: "a truth value", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
