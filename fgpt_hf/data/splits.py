"""Decide by a hash of each document whether it is trained on or held out for validation.

The decision depends on the text alone: it is the same on every machine, in any order and process, and a larger fraction
holds out all that a smaller one does. Equal documents are always in the same split. The price: a fraction of 1 % holds
out 1 % of the documents on average, not exactly. This module imports neither torch nor datasets, because each
tokenizing process starts with it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from fgpt_hf.errors import UserError
from fgpt_hf.tokenizer.fast_encoding import encode_documents

TRAIN, VALIDATION = SPLITS = ("train", "validation")  # as they are called on the Hub


@dataclass(frozen=True)
class SplitSize:
    """The size of one split.

    Attributes:
        tokens: those of the documents, without separators and padding.
        rows: the number of rows that they are packed into, 0 where they are not.
        padding: the number of `<|pad|>` in the rows.
        cut: the number of documents in more pieces than their length makes necessary, so that rows are full.
    """

    documents: int = 0
    tokens: int = 0
    rows: int = 0
    padding: int = 0
    cut: int = 0

    def __add__(self, other: "SplitSize") -> "SplitSize":
        return SplitSize(
            self.documents + other.documents,
            self.tokens + other.tokens,
            self.rows + other.rows,
            self.padding + other.padding,
            self.cut + other.cut,
        )


Sizes = Mapping[str, SplitSize]  # by the name of the split


def is_validation(text: str, validation_fraction: float) -> bool:
    """Return whether a document is held out, so never trained on.

    Example:
        >>> is_validation("Once upon a time", 0.01), is_validation("Once upon a time", 0.2)
        (False, True)
    """
    return document_hash(text) < validation_fraction


def document_hash(text: str) -> float:
    """Return a number in [0, 1) that depends on the text alone.

    Example:
        >>> document_hash("Once upon a time")
        0.1461806604011393
    """
    digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48


def encode_splits(
    texts: Sequence[str], validation_fraction: float, splits: Sequence[str], repeats: float = 1.0
) -> dict[str, list[npt.NDArray[np.uint16]]]:
    """Return the token ids of the documents in each of `splits`; other documents are not tokenized.

    Args:
        repeats: how often each document to train on is there: of 2.5, three times for half of them and twice for the
            others, which a hash decides.
    """
    chosen: dict[str, list[str]] = {split: [] for split in splits}
    for text in texts:
        split = VALIDATION if is_validation(text, validation_fraction) else TRAIN
        if split in chosen:
            chosen[split] += [text] * (_times(text, repeats) if split == TRAIN else 1)
    return {split: encode_documents(members, threads=1) for split, members in chosen.items()}


def _times(text: str, repeats: float) -> int:
    whole = math.floor(repeats)
    return whole + (repeats > whole and document_hash(f"{text} again") < repeats - whole)


def empty_split_error(validation_fraction: float, split: str) -> UserError:
    """Return the error to raise when no document is in a split."""
    purpose = "train on" if split == TRAIN else "hold out"
    return UserError(
        f"no document to {purpose}: either validation_fraction={validation_fraction} leaves none, so choose another "
        "fraction, or the corpus holds no text"
    )
