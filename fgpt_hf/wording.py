"""Counts and lists of names, for messages."""

from collections.abc import Sequence

SHOWN = 3  # names in a message


def count_of(number: int, noun: str) -> str:
    """Return a count with its noun, in the plural where needed.

    Example:
        >>> count_of(1, "row"), count_of(1200, "row"), count_of(1, "row of conversations")
        ('1 row', '1,200 rows', '1 row of conversations')
        >>> count_of(2, "row of conversations")
        '2 rows of conversations'
    """
    first, *others = noun.split(" ", 1)
    return " ".join([f"{number:,}", first if number == 1 else f"{first}s", *others])


def some_of(names: Sequence[str]) -> str:
    """Return the first names, and how many there are in all if some are left out.

    Example:
        >>> some_of(["a", "b", "c", "d"])
        'a, b, c, … (4 in all)'
    """
    more = f", … ({len(names):,} in all)" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
