"""A model's card and the record of its training, parsed for the page."""

from __future__ import annotations

import json
import re
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard


class Card:
    """The card of a model's folder; all parts are empty if there is none."""

    def __init__(self, folder: Path) -> None:
        self.folder, file = folder, folder / "README.md"
        card = ModelCard(file.read_text("utf-8"), ignore_metadata_errors=True) if file.is_file() else None
        self.text: str = card.text.strip() if card else ""
        self.data: dict[str, Any] = card.data.to_dict() if card else {}

    @property
    def title(self) -> str:
        """Return the first heading."""
        heading = re.search(r"^# (.+)$", self.text, re.MULTILINE)
        return heading[1].strip() if heading else ""

    @property
    def is_conversational(self) -> bool:
        """Return whether the card is tagged so; a model without a card may be conversational."""
        return not self.data or "conversational" in (self.data.get("tags") or [])

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
        return self._lines("metrics.jsonl")

    @cached_property
    def samples(self) -> list[dict[str, Any]]:
        """Return the lines of the run's `samples.jsonl`."""
        return self._lines("samples.jsonl")

    def _lines(self, name: str) -> list[dict[str, Any]]:
        """Read a JSON-lines file beside the card or, for a run on this machine, in the folder above the model's."""
        paths = (folder / name for folder in (self.folder, self.folder.parent))
        file = next((path for path in paths if path.is_file()), None)
        return [json.loads(line) for line in file.read_text("utf-8").split("\n") if line] if file else []
