"""Take a card's front matter apart from its body, however an editor saved the file."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import EvalResult, ModelCardData

from fgpt_hf.errors import UserError
from fgpt_hf.parsing import parse_yaml

CARD = "README.md"
# Editors add a byte order mark, blank lines before the dashes and spaces after them.
_FRONT_MATTER = re.compile(r"\A[\ufeff\s]*^---[ \t]*\n(?P<yaml>.*?)^---[ \t]*$\n?", re.DOTALL | re.MULTILINE)


class SplitCard(NamedTuple):
    """The fields of a card's front matter, and the text below it."""

    fields: dict[str, Any]
    text: str


def split_card(card: str) -> SplitCard:
    r"""Return the fields of a card and its text; a card that begins with anything but fields is all text.

    Raises:
        UserError: there is a front matter, but it is not YAML.

    Example:
        >>> split_card("\ufeff\n--- \nlicense: mit\n---\n# tiny")
        SplitCard(fields={'license': 'mit'}, text='# tiny')
        >>> split_card("---\nA text between two rules\n---\n").fields
        {}
    """
    card = re.sub(r"\r\n?", "\n", card).removeprefix("\ufeff")
    found = _FRONT_MATTER.match(card)
    if found is None:
        return SplitCard({}, card)
    try:
        fields = parse_yaml(found["yaml"])
    except UserError as error:
        raise UserError(f"the front matter of the model card cannot be read: {error}") from error
    if fields is not None and not isinstance(fields, dict):
        return SplitCard({}, card)
    return SplitCard({str(name): value for name, value in (fields or {}).items()}, card[found.end() :])


def tidy_card(card: str) -> str:
    """Return a card with its front matter as `huggingface_hub.ModelCard` finds it; raises as `split_card`."""
    fields, text = split_card(card)
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---\n{text}"


def read_card(path: Path) -> str:
    """Return the text of a card's file.

    Raises:
        UserError: it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged: it is not UTF-8 text ({error})") from error


def results_of_card(card: str) -> list[EvalResult]:
    """Return the results in a card's `model-index`.

    Raises:
        UserError: the card's front matter cannot be read.
    """
    try:
        data = ModelCardData(**split_card(card).fields, ignore_metadata_errors=True)
    except (ValueError, TypeError, AttributeError) as error:  # a model-index of another form
        raise UserError(f"the front matter of the model card cannot be read: {error}") from error
    results: list[EvalResult] = data.get("eval_results") or []
    return results
