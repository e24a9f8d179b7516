"""Decide by a hash of each document whether it is trained on or held out for validation.

The hash depends on the text alone: the split is the same on every machine, in any order and process, and a larger
fraction holds out all that a smaller one does. Equal documents are always in the same split. Where all documents are
known, exactly the fraction of them is held out, those of the smallest hashes, and at least one. Of a stream, and of the
embedded corpus and the sets that are made of it, those are held out whose hash is below the fraction, whatever else
there is: 1 % on average.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from fgpt_hf.errors import UserError

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

HELD_OUT = "held out by validation_dataset"  # why a file or a row is not trained on
NOTHING_HELD_OUT = (
    "validation_fraction=0 holds nothing out: there will be no validation loss, and nothing will show overfitting"
)


@dataclass(frozen=True)
class ValidationRule:
    """Which documents are held out for validation.

    Attributes:
        threshold: those are whose hash is below this; with 0 none is.
        lone_document_cut: where there is one document only, the number of its characters that are trained on; the
            others are held out.
    """

    threshold: float
    lone_document_cut: int | None = None

    def divide(self, text: str) -> list[tuple[str, str]]:
        """Return the parts of a document, each with its split.

        Example:
            >>> ValidationRule(0.01).divide("Once upon a time")
            [('train', 'Once upon a time')]
            >>> ValidationRule(0.01, lone_document_cut=10).divide("Once upon a time")
            [('train', 'Once upon '), ('validation', 'a time')]
        """
        if (cut := self.lone_document_cut) is not None:
            return [(TRAIN, text[:cut]), (VALIDATION, text[cut:])]
        return [(VALIDATION if is_validation(text, self.threshold) else TRAIN, text)]


NONE_HELD_OUT, ALL_HELD_OUT = ValidationRule(0.0), ValidationRule(1.0)


def validation_threshold(hashes: Iterable[float], validation_fraction: float) -> float:
    """Return the hash below which lie those of the documents to hold out: the fraction of them, but at least one.

    Equal documents count once. One is left to train on. If there are fewer than two, this is the fraction.

    Example:
        >>> validation_threshold([0.9, 0.4, 0.7, 0.4], 0.01)
        0.7
    """
    distinct = sorted(set(hashes))
    if validation_fraction == 0 or len(distinct) < 2:
        return validation_fraction
    return distinct[min(max(1, round(len(distinct) * validation_fraction)), len(distinct) - 1)]


def is_validation(text: str, threshold: float) -> bool:
    """Return whether a document is held out, so never trained on.

    Example:
        >>> is_validation("Once upon a time", 0.01), is_validation("Once upon a time", 0.2)
        (False, True)
    """
    return document_hash(text) < threshold


def document_hash(text: str) -> float:
    """Return a number in [0, 1) that depends on the text alone.

    Example:
        >>> document_hash("Once upon a time")
        0.1461806604011393
    """
    digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48


def split_texts(
    texts: Sequence[str], rule: ValidationRule, splits: Sequence[str] = SPLITS, repeats: float = 1.0
) -> dict[str, list[str]]:
    """Return the documents in each of `splits`, or their parts there.

    Args:
        repeats: how often each document to train on is there: of 2.5, three times for half of them and twice for the
            others, which a hash decides.

    Example:
        >>> split_texts(["Once upon a time"], ValidationRule(0.01), repeats=2)
        {'train': ['Once upon a time', 'Once upon a time'], 'validation': []}
    """
    chosen: dict[str, list[str]] = {split: [] for split in splits}
    for text in texts:
        for split, part in rule.divide(text):
            if split in chosen:
                chosen[split] += [part] * (times_an_epoch(f"{text} again", repeats) if split == TRAIN else 1)
    return chosen


def times_an_epoch(name: str, repeats: float) -> int:
    """Return how often one epoch holds a row that epochs hold `repeats` times on average, by a hash of its name.

    Of 2.5 repeats, half of the names have three and the others two.

    Example:
        >>> [times_an_epoch(f"row {number}", repeats=2.5) for number in range(6)]
        [3, 3, 3, 2, 2, 2]
    """
    whole = math.floor(repeats)
    return whole + (repeats > whole and document_hash(name) < repeats - whole)


def empty_split_error(validation_fraction: float, split: str) -> UserError:
    """Return the error to raise when no document is in a split."""
    purpose = "train on" if split == TRAIN else "hold out"
    return UserError(
        f"no document to {purpose}: either validation_fraction={validation_fraction} leaves none, so choose another "
        "fraction (0 trains on all documents), or the corpus holds no text"
    )
