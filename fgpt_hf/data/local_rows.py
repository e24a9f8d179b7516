"""Read the rows of files on this machine: conversations or preference pairs, in any usual layout."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from fgpt_hf.data.encodings import encoding_of
from fgpt_hf.data.json_rows import Row
from fgpt_hf.data.local_files import CSV, JSON, TABLES, FoundFiles, LocalFile, find_files, left_out_lines, log_once
from fgpt_hf.data.readers import ROWS_AT_ONCE, read_rows
from fgpt_hf.errors import UserError
from fgpt_hf.retries import reading
from fgpt_hf.wording import count_of

# Columns that a row of conversations or of pairs may need; whatever else a row holds does not matter.
COLUMNS = (
    *("messages", "conversations", "conversation", "system", "system_prompt"),
    *("prompt", "completion", "response", "instruction", "input", "context", "output", "question", "answer"),
    *("chosen", "rejected", "document_hash"),
)


@dataclass(frozen=True)
class LocalRows:
    """Rows in memory, each with those of `COLUMNS` that its file has.

    Attributes:
        column_names: all columns of the files, in the order in which they appear.
        rows: the rows.
        row_ids: where each row stands, such as "row 7 of chats.jsonl".
    """

    column_names: Sequence[str]
    rows: Sequence[Row]
    row_ids: Sequence[str]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        """Yield each row, with None in the columns that it lacks."""
        lacking = dict.fromkeys(name for name in self.column_names if name in COLUMNS)
        return ({**lacking, **row} for row in self.rows)

    def select(self, indices: Sequence[int]) -> "LocalRows":
        """Return the rows at these indices."""
        rows = [self.rows[index] for index in indices]
        return LocalRows(self.column_names, rows, [self.row_ids[index] for index in indices])


def load_local_rows(name: str, encoding: str | None = None) -> LocalRows:
    """Return the rows of the files that a path, a folder or a glob stands for, and say how many there are.

    Raises:
        UserError: there are no such files, or no rows in them, or one of them cannot be read.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import mkdtemp
        >>> path = Path(mkdtemp(), "chats.jsonl")
        >>> _ = path.write_text('[{"role": "user", "content": "Hi"}]\\n{"prompt": "2 + 2?", "completion": "4"}\\n')
        >>> load_local_rows(str(path)).column_names
        ['messages', 'prompt', 'completion']
    """
    found = find_files(name, TABLES)
    columns: dict[str, None] = {}
    rows, row_ids = [], []
    for file in found.files:
        for number, row in enumerate(_rows_of(file, encoding)):
            if row is not None:
                columns.update(dict.fromkeys(row))
                rows.append({column: row[column] for column in COLUMNS if column in row})
                row_ids.append(f"row {number} of {file.path}")
        file.require_unchanged()
    if not rows:
        raise UserError(f"{name}: {'the file is empty' if len(found.files) == 1 else 'its files are empty'}")
    log_once(_report(name, found, len(rows)))
    return LocalRows(list(columns), rows, row_ids)


def sample_local_rows(name: str, encoding: str | None = None) -> LocalRows:
    """Return the first thousand rows of each file, as `load_local_rows` returns all of them."""
    found = find_files(name, TABLES)
    rows = [row for file in found.files for row in islice(_rows_of(file, encoding), ROWS_AT_ONCE) if row]
    return LocalRows(list(dict.fromkeys(column for row in rows for column in row)), rows, [""] * len(rows))


def _rows_of(file: LocalFile, encoding: str | None) -> Iterator[Row | None]:
    with reading(str(file.path)):
        encoding = encoding_of(file, encoding) if file.format in (JSON, CSV) else "utf-8"
        yield from read_rows(file, encoding)


def _report(name: str, found: FoundFiles, rows: int) -> str:
    lines = [f"{name}: {count_of(len(found.files), 'file')}, {count_of(rows, 'row')}"]
    return "\n".join([*lines, *left_out_lines(found.left_out)])
