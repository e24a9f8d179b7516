"""A model's card and the record of its training, parsed for the page."""

from __future__ import annotations

import json
import re
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard

from page_text import card_text


class Card:
    """The card of a model's folder; all parts are empty if there is none, or none that can be read."""

    def __init__(self, folder: Path) -> None:
        self.folder, file = folder, folder / "README.md"
        text = file.read_text("utf-8", "replace") if file.is_file() else ""
        self.text, self.data = _parsed(text)

    @property
    def title(self) -> str:
        """Return the first heading."""
        heading = re.search(r"^# (.+)$", self.text, re.MULTILINE)
        return heading[1].strip() if heading else ""

    @property
    def tags(self) -> list[str]:
        """Return the tags."""
        tags = self.data.get("tags")
        return [str(tag) for tag in tags] if isinstance(tags, list) else []

    @property
    def is_conversational(self) -> bool:
        """Return whether the card is tagged so; a model without a card may be conversational."""
        return not self.data or "conversational" in self.tags

    @property
    def base_model(self) -> str:
        """Return the name of the model that this one was trained from, or nothing."""
        named = self.data.get("base_model")
        first = named[0] if isinstance(named, list) and named else named
        return first if isinstance(first, str) else ""

    def section(self, heading: str) -> str:
        """Return the text under a heading, up to the next heading."""
        found = re.search(rf"^#+ {re.escape(heading)}$(.*?)(?=^#+ |\Z)", self.text, re.MULTILINE | re.DOTALL)
        return found[1].strip() if found else ""

    def first_words(self, heading: str) -> str:
        """Return the first paragraph under a heading, such as the card's title."""
        paragraphs = [part.strip() for part in self.section(heading).split("\n\n")]
        return next((part for part in paragraphs if part and not part.startswith(("|", "<", "```"))), "")

    def column(self, heading: str, name: str) -> list[str]:
        """Return the distinct cells of a column in the first table under a heading; nothing without such a table."""
        lines = re.findall(r"^\|(.*)\|$", self.section(heading), re.MULTILINE)
        header, *rows = ([cell.strip() for cell in re.split(r"(?<!\\)\|", line)] for line in lines) if lines else [[]]
        if name not in header:
            return []
        cells = (row[header.index(name)] for row in rows[1:] if len(row) == len(header))
        return list(dict.fromkeys(filter(None, cells)))

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """Return the lines of the run's `metrics.jsonl`."""
        return [line for line in self._lines("metrics.jsonl") if isinstance(line.get("step"), int)]

    @cached_property
    def samples(self) -> list[dict[str, Any]]:
        """Return the lines of the run's `samples.jsonl`."""
        return [line for line in self._lines("samples.jsonl") if isinstance(line.get("step"), int)]

    def _lines(self, name: str) -> list[dict[str, Any]]:
        """Read a JSON-lines file beside the card or, for a run on this machine, in the folder above the model's."""
        paths = (folder / name for folder in (self.folder, self.folder.parent))
        file = next((path for path in paths if path.is_file()), None)
        lines = [_json(line) for line in file.read_text("utf-8", "replace").split("\n")] if file else []
        return [line for line in lines if isinstance(line, dict)]


def _parsed(text: str) -> tuple[str, dict[str, Any]]:
    """Return a card's text and metadata; what is no card is text without any."""
    try:
        card = ModelCard(text, ignore_metadata_errors=True)
        return card.text.strip(), card.data.to_dict()
    except (ValueError, TypeError, AttributeError, yaml.YAMLError):  # as huggingface_hub fails on what is no metadata
        return re.sub(r"\A---\n.*?^---\n", "", text, flags=re.DOTALL | re.MULTILINE).strip(), {}


def _json(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def summary(card: Card, otherwise: str) -> str:
    """Return what the model is and was trained on, in one paragraph of Markdown.

    Args:
        card: Its card.
        otherwise: What to say if the card has no first paragraph.
    """
    what = card_text(card.first_words(card.title)) or otherwise
    data = card_text(", ".join(card.column("Training data", "data")))
    return what + (f" Trained on {data}." if data else "")


def limits(card: Card) -> str:
    """Return what the model is not for, as Markdown."""
    stated = card_text(card.first_words("Intended use and limitations"))
    return stated or "It continues text, and does not know what is true."
