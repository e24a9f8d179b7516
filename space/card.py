"""What a model's card, and the record of its training, say to a visitor."""

from __future__ import annotations

import json
import re
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard


class Card:
    """The card of a model's folder; everything is empty where there is none."""

    def __init__(self, folder: Path) -> None:
        self.folder, file = folder, folder / "README.md"
        card = ModelCard(file.read_text("utf-8"), ignore_metadata_errors=True) if file.is_file() else None
        self.text: str = card.text.strip() if card else ""
        self.data: dict[str, Any] = card.data.to_dict() if card else {}

    @property
    def title(self) -> str:
        """Its first heading."""
        heading = re.search(r"^# (.+)$", self.text, re.MULTILINE)
        return heading[1].strip() if heading else ""

    @property
    def is_conversational(self) -> bool:
        """Whether it says so; a model without a card may be."""
        return not self.data or "conversational" in (self.data.get("tags") or [])

    def section(self, heading: str) -> str:
        """What stands under a heading, up to the next one."""
        found = re.search(rf"^#+ {re.escape(heading)}$(.*?)(?=^#+ |\Z)", self.text, re.MULTILINE | re.DOTALL)
        return found[1].strip() if found else ""

    def first_words(self, heading: str) -> str:
        """The first paragraph under a heading; the card's title is one."""
        paragraphs = [part.strip() for part in self.section(heading).split("\n\n")]
        return next((part for part in paragraphs if part and not part.startswith(("|", "<", "```"))), "")

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of the run's `metrics.jsonl`."""
        return self._lines("metrics.jsonl")

    @cached_property
    def samples(self) -> list[dict[str, Any]]:
        """The lines of the run's `samples.jsonl`."""
        return self._lines("samples.jsonl")

    def _lines(self, name: str) -> list[dict[str, Any]]:
        """The JSON lines of a file beside the card or, of a run on this machine, above its model's folder."""
        file = next((place / name for place in (self.folder, self.folder.parent) if (place / name).is_file()), None)
        return [json.loads(line) for line in file.read_text("utf-8").split("\n") if line] if file else []
