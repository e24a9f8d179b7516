"""The embedded four-way benchmark: which ending belongs to the beginning of this docstring?

Made from the embedded corpus's held-out documents, which no base model trained on that corpus has seen. The three
wrong endings are those of sibling objects, of the same module, so that the subject alone does not give the answer.
"""

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

from fgpt_hf.corpora import document_hash
from fgpt_hf.pydocs import load_pydocs

HELD_OUT_SHARE = 0.01  # the share that base training holds out by default; a larger one holds these documents out too
ENDINGS = 4
CONTEXT_WORDS = range(8, 48)  # how long the beginning of a docstring may be
ENDING_WORDS = 8


def load_pydocs_choice() -> list[dict[str, Any]]:
    """Rows of `id`, `context`, `endings` and `label`, always the same for the same installed packages."""
    documents = ((document_hash(document["text"]), document) for document in load_pydocs())
    held_out = sorted((item for item in documents if item[0] < HELD_OUT_SHARE), key=lambda item: item[0])
    return [row for _, document in held_out for row in module_choices(document["members"])]


def module_choices(members: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """The choices among one module's docstrings, one for each docstring that is long enough to be parted.

    A beginning is about half a docstring, behind the signature as in the corpus; an ending is the next words, as many
    for each choice. Endings that are equal count once, and where fewer than four are left there is no choice.
    """
    parted = {member["name"]: parts for member in members if (parts := _parted(member))}
    return [
        row
        for name, (context, ending) in parted.items()
        if (row := _choice(name, context, ending, [other for _, other in parted.values()]))
    ]


def _parted(member: Mapping[str, str]) -> tuple[str, str] | None:
    """The beginning and the ending of a docstring, cut at a space between words, or None where it is too short."""
    words = member["docstring"].split(" ")
    at = min(len(words) // 2, CONTEXT_WORDS.stop - 1)
    ending = " ".join(words[at : at + ENDING_WORDS]).strip()
    if at < CONTEXT_WORDS.start or len(ending.split()) < ENDING_WORDS // 2:
        return None
    return f"{member['signature']}\n{' '.join(words[:at])}".strip(), ending


def _choice(name: str, context: str, ending: str, others: Sequence[str]) -> dict[str, Any] | None:
    wrong = sorted({other for other in others if other != ending}, key=lambda other: _shuffled(name, other))
    if len(wrong) < ENDINGS - 1:
        return None
    endings = sorted([ending, *wrong[: ENDINGS - 1]], key=lambda other: _shuffled(name, "order", other))
    return {"id": name, "context": context, "endings": endings, "label": endings.index(ending)}


def _shuffled(*parts: str) -> bytes:
    """A sort key without any order in it, the same on every machine."""
    return blake2b("\n".join(parts).encode()).digest()
