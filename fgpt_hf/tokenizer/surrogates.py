"""Lone surrogates, which Python strings can hold and UTF-8 cannot."""

from collections.abc import Mapping
from typing import Any


def repair_surrogates(value: Any) -> Any:
    """Return text, or containers of text, with surrogate pairs joined and lone surrogates replaced by U+FFFD.

    Example:
        >>> repair_surrogates({"content": "a\\ud800b"})
        {'content': 'a\ufffdb'}
    """
    if isinstance(value, str):
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, Mapping):
        return {repair_surrogates(key): repair_surrogates(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [repair_surrogates(item) for item in value]
    return value
