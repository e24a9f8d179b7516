"""The model card: written from what the run knows, around what a person wrote."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from fgpt_hf.errors import UserError
from fgpt_hf.hub.card_results import joined_results, model_index
from fgpt_hf.hub.card_sections import CardOptions, sections
from fgpt_hf.hub.run_record import RunRecord, read_facts, results_of_card

CARD = "README.md"
_BEGIN = "<!-- fgpt: written from the run; edits up to the end mark are lost, edits outside stay ({digest}) -->"
_END = "<!-- fgpt: end -->"
_GENERATED = re.compile(
    re.escape(_BEGIN).replace(r"\{digest\}", "(?P<digest>[0-9a-f]*)") + ".*?" + re.escape(_END), re.DOTALL
)
_FRONT_MATTER = re.compile(r"\A---\r?\n(?P<yaml>.*?)\r?\n---\r?\n?", re.DOTALL)
_JOINED = ("tags", "datasets")  # lists in which a person's entries stay beside the run's


def write_card(model: Path) -> Path:
    """Write the card of a model's folder, from its files and its run's; what a person wrote in an older one stays."""
    card = card_of(read_facts(model), CardOptions())
    (model / CARD).write_text(card, encoding="utf-8")
    return model / CARD


def card_of(facts: RunRecord, told: CardOptions) -> str:
    """The card as it should be now, around what a person wrote in the folder's own."""
    card, file = build_card(facts, told), facts.model / CARD
    return merge_card(card, file.read_text(encoding="utf-8")) if file.is_file() else card


def build_card(facts: RunRecord, told: CardOptions) -> str:
    """The card without anything that a person wrote."""
    body = "\n\n".join(section for section in sections(facts, told) if section)
    return _assembled(front_matter(facts, told), "", body, "")


def front_matter(facts: RunRecord, told: CardOptions) -> dict[str, Any]:
    """What the Hub reads of a card; a field that is not known is left out."""
    base_model = told.base_model or facts.base_model
    index = model_index(facts, told.title(facts))
    fields = {
        "language": told.language,
        "license": told.license,
        "library_name": "peft" if facts.is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["fgpt", "gpt2", *(["conversational"] if facts.is_chat_model else [])],
        "datasets": facts.hub_datasets or None,
        "base_model": base_model,
        "metrics": _metric_names(index) if index else None,
        "model-index": index or None,
    }
    return {name: value for name, value in fields.items() if value is not None}


def merge_card(card: str, published: str, keep_results: bool = True) -> str:
    """A new card with what people wrote around its generated part and around that of the `published` one.

    Of the two texts, that one stands which was edited since the last publish. In the front matter the new card's values
    win; fields that only the published one has stay, and so do its tags, data sets and, if they are of the same
    weights, other results. A new card without a generated part is a person's own, and replaces the published one.

    Raises:
        UserError: people edited both, differently.
    """
    if not _GENERATED.search(card):
        return card
    earlier = results_of_card(published) if keep_results else []
    new, old = _Parts(card), _Parts(published)
    ours, theirs = (new.before, new.after), (old.before, old.after)
    edited_there = old.digest != _digest(*theirs)
    if not any(ours) or (edited_there and _digest(*ours) == old.digest):
        ours = theirs
    elif any(theirs) and ours != theirs and edited_there:
        raise UserError(
            f"{CARD} was edited here and on the Hub, in different ways: make the text outside the marks the same in "
            "both, publish, and go on with either"
        )
    if not keep_results:
        old.fields = {name: value for name, value in old.fields.items() if name not in ("model-index", "metrics")}
    fields = old.fields | new.fields
    for name in _JOINED:
        entries = [*_as_list(new.fields.get(name)), *_as_list(old.fields.get(name))]
        fields |= {name: list(dict.fromkeys(entries))} if entries else {}
    if index := new.fields.get("model-index"):
        index = joined_results(index, index[0]["name"], earlier)
        fields |= {"model-index": index, "metrics": _metric_names(index)}
    return _assembled(fields, ours[0], new.body, ours[1])


class _Parts:
    """A card taken apart: front matter, a person's text before, the generated body, a person's text after."""

    def __init__(self, card: str) -> None:
        front = _FRONT_MATTER.match(card)
        text = card[front.end() :] if front else card
        generated = _GENERATED.search(text)
        self.fields: dict[str, Any] = (yaml.safe_load(front["yaml"]) if front else None) or {}
        self.before = text[: generated.start()].strip() if generated else text.strip()
        self.after = text[generated.end() :].strip() if generated else ""
        self.body = _body(generated[0]) if generated else ""
        self.digest = generated["digest"] if generated else None


def _body(generated: str) -> str:
    return generated.split("-->", 1)[1].removesuffix(_END).strip()


def _metric_names(index: list[dict[str, Any]]) -> list[str]:
    """Each metric of a `model-index` once, in their order."""
    return list(dict.fromkeys(metric["type"] for result in index[0]["results"] for metric in result["metrics"]))


def _digest(before: str, after: str) -> str:
    """A short name for the text that people wrote, by which a later publish sees whether they have gone on."""
    return hashlib.sha256(f"{before}\0{after}".encode()).hexdigest()[:12]


def _assembled(fields: dict[str, Any], before: str, body: str, after: str) -> str:
    front = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=1000)
    generated = f"{_BEGIN.format(digest=_digest(before, after))}\n\n{body}\n\n{_END}"
    return "\n\n".join([f"---\n{front}---", *filter(None, (before, generated, after))]) + "\n"


def _as_list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
