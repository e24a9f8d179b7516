"""Keep what people wrote in a card around the part that is generated, and in its front matter."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from huggingface_hub.repocard_data import eval_results_to_model_index

from fgpt_hf.errors import UserError
from fgpt_hf.hub.card_results import join_results, metric_names
from fgpt_hf.hub.front_matter import CARD, results_of_card, split_card

_BEGIN = "<!-- fgpt: written from the run; edits up to the end mark are lost, edits outside stay ({digest}) -->"
_END = "<!-- fgpt: end -->"
_GENERATED = re.compile(
    re.escape(_BEGIN).replace(r"\{digest\}", "(?P<digest>[0-9a-f]*)") + "(?P<body>.*)" + re.escape(_END), re.DOTALL
)
_JOINED = ("tags", "datasets")  # lists in which a person's entries stay next to the run's


def mark_as_generated(card: str) -> str:
    """Return a card with marks around everything below its front matter, outside of which people may write."""
    parts = _Parts(card)
    return _assemble(parts.fields, "", parts.before, "")


def merge_card(card: str, published: str, keep_results: bool = True) -> str:
    """Return a new card with what people wrote around its generated part and around that of the `published` one.

    Of the two texts, the one that was edited since the last publish wins. In the front matter the new card's values
    win; fields that only the published one has stay, and so do its tags, datasets and, if they are of the same
    weights (`keep_results`), other results. A new card without a generated part was written by a person, and replaces
    the published one.

    Raises:
        UserError: people edited both, differently; or a front matter is not YAML.

    Example:
        >>> new = mark_as_generated("---\\nlicense: mit\\n---\\n# tiny")
        >>> "By hand." in merge_card(new, new + "By hand.")
        True
    """
    if not _GENERATED.search(card):
        return card
    earlier = results_of_card(published) if keep_results else []
    new, old = _Parts(card), _Parts(published)
    before, after = _latest_edit(new, old)
    if not keep_results:
        old.fields = {name: value for name, value in old.fields.items() if name not in ("model-index", "metrics")}
    fields = old.fields | new.fields
    for name in _JOINED:
        entries = [*_as_list(new.fields.get(name)), *_as_list(old.fields.get(name))]
        fields |= {name: list(dict.fromkeys(entries))} if entries else {}
    if index := new.fields.get("model-index"):
        results = join_results(results_of_card(card), earlier)
        index = eval_results_to_model_index(index[0]["name"], results)
        fields |= {"model-index": index, "metrics": metric_names(results)}
    return _assemble(fields, before, new.body, after)


class _Parts:
    """A card taken apart: front matter, a person's text before, the generated body, a person's text after."""

    def __init__(self, card: str) -> None:
        self.fields, text = split_card(card)
        generated = _GENERATED.search(text)
        self.before = text[: generated.start()].strip() if generated else text.strip()
        self.after = text[generated.end() :].strip() if generated else ""
        self.body = generated["body"].strip() if generated else ""
        self.digest = generated["digest"] if generated else None

    @property
    def written(self) -> tuple[str, str]:
        return self.before, self.after


def _latest_edit(new: _Parts, old: _Parts) -> tuple[str, str]:
    """Return what people wrote before and after the generated part, in the card that they edited last."""
    edited_there = old.digest != _digest(*old.written)
    if not any(new.written) or (edited_there and _digest(*new.written) == old.digest):
        return old.written
    if any(old.written) and new.written != old.written and edited_there:
        raise UserError(
            f"{CARD} was edited here and on the Hub, in different ways: make the text outside the marks the same in "
            "both, then publish again"
        )
    return new.written


def _digest(before: str, after: str) -> str:
    """Return a fingerprint of what people wrote, by which a later publish sees whether they have edited it since."""
    return hashlib.sha256(f"{before}\0{after}".encode()).hexdigest()[:12]


def _assemble(fields: Mapping[str, Any], before: str, body: str, after: str) -> str:
    front = yaml.safe_dump(dict(fields), sort_keys=False, allow_unicode=True, width=1000)
    generated = f"{_BEGIN.format(digest=_digest(before, after))}\n\n{body}\n\n{_END}"
    return "\n\n".join([f"---\n{front}---", *filter(None, (before, generated, after))]) + "\n"


def _as_list(value: Any) -> Sequence[Any]:
    """Return the texts of a field that holds one or several; values of other types are left out."""
    return [entry for entry in (value if isinstance(value, list) else [value]) if isinstance(entry, str)]
