"""Parse text and check values from outside: anything wrong with them is a UserError."""

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from fgpt_hf.errors import UserError

MAX_YAML = 1 << 20  # characters; the parser reads a megabyte in seconds
Kind = TypeVar("Kind")


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
        UserError: it is not JSON, not UTF-8, or nested deeper than Python's stack.

    Example:
        >>> parse_json('{"step": 1}')
        {'step': 1}
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"it is not JSON: {error}") from error


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML text; text, numbers, lists and mappings are read, and no aliases.

    A few lines of aliases of aliases stand for gigabytes.

    Raises:
        UserError: it is not such YAML, or very long.

    Example:
        >>> parse_yaml("step: 1")
        {'step': 1}
        >>> parse_yaml("a: &a [1]\\nb: *a")
        Traceback (most recent call last):
            ...
        fgpt_hf.errors.UserError: it is not plain YAML: the alias *a stands for a value elsewhere: write the value
    """
    if len(text) > MAX_YAML:
        raise UserError(f"it is not plain YAML: it has {len(text):,} characters, more than the limit of {MAX_YAML:,}")
    try:
        return yaml.load(text, _PlainLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"it is not plain YAML: {error}") from error


class _PlainLoader(yaml.SafeLoader):
    """Reads YAML without aliases."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            alias = self.peek_event().anchor
            raise yaml.YAMLError(f"the alias *{alias} stands for a value elsewhere: write the value")
        return super().compose_node(parent, index)


def as_type(kind: type[Kind], values: Mapping[str, Any]) -> Kind:
    """Return a data class, or a typed mapping, of values whose types are checked; unknown names are left out.

    Raises:
        UserError: the first value that is missing or of another type.

    Example:
        >>> from fgpt_hf.data.splits import SplitSize
        >>> as_type(SplitSize, {"rows": "many"})
        Traceback (most recent call last):
            ...
        fgpt_hf.errors.UserError: rows='many': Input should be a valid integer, unable to parse string as an integer
    """
    if is_dataclass(kind):
        known = {field.name for field in fields(kind)}
        values = {name: value for name, value in values.items() if name in known}
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        if isinstance(problem := first.get("ctx", {}).get("error"), UserError):  # of the class itself
            raise problem from error
        where = ".".join(map(str, first["loc"])) or "value"
        raise UserError(f"{where}={str(first['input'])[:80]!r}: {first['msg']}") from error
    except RecursionError as error:
        raise UserError("its values are nested too deeply") from error
