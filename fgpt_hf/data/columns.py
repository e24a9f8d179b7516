"""Find the column of a file that holds its documents."""

from collections.abc import Sequence

from fgpt_hf.data.local_files import CSV, LocalFile
from fgpt_hf.data.readers import ReadOptions, no_header, sample_of, text_columns
from fgpt_hf.errors import UserError

USUAL = ("text", "content", "document", "body", "article", "story", "passage", "paragraph", "raw_content")
CHATS = {"messages", "conversations", "prompt", "instruction", "question", "chosen"}
LONGEST_NAME, MOST_WORDS = 40, 4  # of a column's name, in characters and words


def choose_column(file: LocalFile, encoding: str, given: str | None) -> str:
    """Return the column that was given, or else a usual one, or else the only one that holds text.

    Raises:
        UserError: no column holds text, several do, or a CSV file has no header.
    """
    if given is not None:
        return given
    columns, texts = text_columns(file, encoding)
    for name in USUAL:
        if found := next((column for column in columns if column.lower() == name and column in texts), None):
            return found
    if file.format == CSV and any(not _is_name(column) for column in columns):
        raise no_header(file)
    texts = [column for column in texts if _is_prose(sample_of(file, encoding, column))]
    if len(texts) == 1:
        return texts[0]
    if not columns:
        return USUAL[0]
    there = f"{file.path} has the columns {', '.join(columns)}"
    if CHATS & set(columns) and not texts:
        raise UserError(f"{there}: conversations are for train_instruct.py; documents are a column of text")
    if texts:
        raise UserError(f"{there}: give the one of the documents as --text_column_name, one of {', '.join(texts)}")
    raise UserError(f"{there}, and none of them holds text: give another file, or --text_column_name")


def require_column(file: LocalFile, options: ReadOptions, has_documents: bool) -> None:
    """Raise UserError if a file without documents has no such column."""
    if has_documents:
        return
    columns, _ = text_columns(file, options.encoding)
    if columns and options.column not in columns:
        raise UserError(
            f"{file.path} has no column {options.column!r}: text_column_name can be one of {', '.join(columns)}"
        )


def _is_name(column: str | None) -> bool:
    """Return whether a cell of a first line can be the name of a column."""
    if not column or len(column) > LONGEST_NAME or len(column.split()) > MOST_WORDS:
        return False
    return not column.replace(".", "").replace("-", "").isdigit()


def _is_prose(texts: Sequence[str]) -> bool:
    """Return whether texts hold several words each, as identifiers, dates and addresses do not."""
    return sum(len(text.split()) > 1 for text in texts) * 2 >= max(1, len(texts))
