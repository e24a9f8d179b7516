"""Open files of text in any encoding: UTF-8, what a byte order mark says, or what the bytes look like."""

import bz2
import codecs
import gzip
import io
import lzma
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, TextIO, cast

import pyarrow
from charset_normalizer import CharsetMatch, from_bytes

from fgpt_hf.data.local_files import LocalFile
from fgpt_hf.errors import UserError

MARKS = {  # UTF-32's begins with UTF-16's
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
UTF_8 = ("utf-8", "utf-8-sig")
CHUNK = 1 << 20
SAMPLE_BYTES = 1 << 17  # enough to recognize an encoding
MOST_COMMON = "cp1252"  # of the Western encodings, which differ in a few characters
CLOSE = 0.1  # in charset-normalizer's measure of mess


@contextmanager
def open_bytes(file: LocalFile) -> Iterator[BinaryIO]:
    """Open a file for reading, decompressed."""
    if file.compression == ".zst":
        with pyarrow.input_stream(str(file.path), compression="zstd") as stream:
            yield cast(BinaryIO, io.BufferedReader(stream))
        return
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    with openers.get(file.compression, open)(file.path, "rb") as opened:
        yield cast(BinaryIO, opened)


@contextmanager
def open_text(file: LocalFile, encoding: str, newline: str | None = None) -> Iterator[TextIO]:
    """Open a file for reading, decompressed and decoded."""
    with open_bytes(file) as content, io.TextIOWrapper(content, encoding, newline=newline) as text:
        yield text


def encoding_of(file: LocalFile, given: str | None) -> str:
    """Return the encoding of a file: that of its byte order mark, or else the one given, or else the one recognized.

    The whole file is decoded, so later readers meet no surprise.

    Raises:
        UserError: the file is not text in the encoding that was given, or in any that can be recognized.
    """
    with open_bytes(file) as content:
        beginning = content.read(4)
    if given is not None and not _is_known(given):
        raise UserError(f"encoding={given} is unknown: give one of Python's, such as cp1252, utf-16 or shift_jis")
    marked = next((encoding for mark, encoding in MARKS.items() if beginning.startswith(mark)), None)
    encoding = marked or given or "utf-8"
    wrong = _first_wrong_byte(file, encoding)
    if wrong is None:
        return encoding
    if marked or given:
        raise UserError(
            f"{file.path} is not {encoding} text: byte {wrong:,} cannot be decoded; give another --encoding"
        )
    return _recognized(file, wrong)


def _is_known(encoding: str) -> bool:
    """Return whether Python has an encoding of text of this name."""
    try:
        return codecs.lookup(encoding)._is_text_encoding  # not rot13 or zlib, which are no encodings of text
    except LookupError:
        return False


def _first_wrong_byte(file: LocalFile, encoding: str) -> int | None:
    """Return the offset of the first byte that is not text, or None if there is none."""
    decoder = codecs.getincrementaldecoder(encoding)()
    offset = 0
    with open_bytes(file) as content:
        while True:
            chunk = content.read(CHUNK)
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                return max(0, offset - pending + error.start)
            if "\0" in text:
                return offset + max(0, chunk.find(0))
            if not chunk:
                return None
            offset += len(chunk)


def _recognized(file: LocalFile, wrong: int) -> str:
    with open_bytes(file) as content:
        content.seek(max(0, wrong - SAMPLE_BYTES // 2) // 4 * 4)
        matches = list(from_bytes(content.read(SAMPLE_BYTES)))
    encoding = _best(matches)
    if encoding is None or _first_wrong_byte(file, encoding) is not None:
        raise UserError(
            f"{file.path} cannot be read as text: byte {wrong:,} is not UTF-8, and no other encoding is recognized; "
            "give it as --encoding, such as cp1252"
        )
    return encoding


def _best(matches: list[CharsetMatch]) -> str | None:
    """Return the likeliest encoding, the most common one if it is as likely as any."""
    if not matches:
        return None
    best = matches[0]
    for match in matches:
        alike = match.chaos <= best.chaos + CLOSE and match.coherence >= best.coherence
        if alike and MOST_COMMON in (match.encoding, *match.could_be_from_charset):
            return MOST_COMMON
    return best.encoding
