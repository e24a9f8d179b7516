"""The embedded conversations: what a documented object is for, asked in several ways and answered by its docstring.

Made from the embedded corpus. A conversation is held out where base training holds out the document that it is made of.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Any

from datasets import Dataset

from fgpt_hf.data.corpora import document_hash
from fgpt_hf.data.pydocs import load_pydocs

ANSWER_WORDS = range(4, 41)  # shorter first sentences say nothing, longer ones are seldom sentences
MAX_SIGNATURE_CHARACTERS = 120
# Prose up to its first full stop: it may go on over line ends, but not over an empty line.
SENTENCE = re.compile(r"[A-Z][^\n]*?(?:\n(?!\s*\n)[^\n]*?)*?[.!?](?=\s|\Z)")
# What is no prose: code, headings, tables, directives, tests.
MARKUP = re.compile(r">>>|:\w+:`|::|\.\. |==|--|\*\*|[|{}<>\\@]|https?:")
QUESTIONS: Mapping[str, Sequence[str]] = {
    "module": ("What is the module `{}` for?", "What does the module `{}` hold?"),
    "class": ("What is `{}`?", "What is the class `{}` for?"),
    "function": ("What does `{}` do?", "What is the function `{}` for?"),
    "method": ("What does `{}` do?", "What is the method `{}` for?"),
}


def load_pydocs_chat() -> Dataset:
    """Rows of `messages` and `document_hash`, always the same for the same installed packages."""
    rows = [row for document in load_pydocs() for row in document_chats(document["text"], document["members"])]
    return Dataset.from_list(rows)


def document_chats(text: str, members: Sequence[Mapping[str, str]]) -> Iterator[dict[str, Any]]:
    """A conversation for each member of a document whose docstring begins with a sentence."""
    place = document_hash(text)
    for member in members:
        if (answer := first_sentence(member["docstring"])) is not None:
            forms = QUESTIONS[member["kind"]]
            question = forms[int(document_hash(member["name"]) * len(forms))].format(_called(member))
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            yield {"messages": messages, "document_hash": place}


def first_sentence(docstring: str) -> str | None:
    """The sentence that a docstring begins with, on one line, or None where it begins with something else."""
    found = SENTENCE.match(docstring)
    words = found[0].split() if found else []
    return " ".join(words) if len(words) in ANSWER_WORDS and not MARKUP.search(" ".join(words)) else None


def _called(member: Mapping[str, str]) -> str:
    """A function's signature, or the dotted name where that is short of sense or long."""
    signature = member["signature"].removeprefix("async ")
    short = member["kind"] in ("function", "method") and len(signature) <= MAX_SIGNATURE_CHARACTERS
    return signature if short else member["name"]


def load_pydocs_preference() -> Dataset:
    """Rows of `prompt`, `chosen`, `rejected` and `document_hash`, always the same for the same installed packages.

    No question is asked twice.
    """
    rows = (row for document in load_pydocs() for row in document_pairs(document["text"], document["members"]))
    asked: dict[str, dict[str, Any]] = {}
    for row in rows:
        asked.setdefault(row["prompt"], row)
    return Dataset.from_list(list(asked.values()))


def document_pairs(text: str, members: Sequence[Mapping[str, str]]) -> Iterator[dict[str, Any]]:
    """A pair for each conversation about a document's members; one that stands alone has no other's answer."""
    chats = list(document_chats(text, members))
    answers = sorted({chat["messages"][1]["content"] for chat in chats})
    for chat in chats:
        question, answer = (message["content"] for message in chat["messages"])
        draw = document_hash(question)
        others = [other for other in answers if other != answer]
        rejected = others[int(2 * draw * len(others))] if draw < 0.5 and others else looping(answer)
        yield {
            "prompt": question,
            "chosen": answer,
            "rejected": rejected,
            "document_hash": chat["document_hash"],
        }


def looping(sentence: str) -> str:
    """The sentence as a model would have it that does not get past its middle."""
    words = sentence.split()
    middle = max(2, len(words) // 2)
    return " ".join([*words[:middle], *words[max(0, middle - 3) : middle] * 3])


VALIDATION_FRACTION = (
    0.01  # the share that base training holds out by default; a larger one holds these documents out too
)
ENDINGS = 4
CONTEXT_WORDS = range(8, 48)  # how long the beginning of a docstring may be
ENDING_WORDS = 8


def load_pydocs_choice() -> list[dict[str, Any]]:
    """Rows of `id`, `context`, `endings` and `label`, always the same for the same installed packages."""
    documents = ((document_hash(document["text"]), document) for document in load_pydocs())
    validation = sorted((item for item in documents if item[0] < VALIDATION_FRACTION), key=lambda item: item[0])
    return [row for _, document in validation for row in module_choices(document["members"])]


def module_choices(members: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """The choices among one module's docstrings, one for each docstring that is long enough to be parted.

    A beginning is about half a docstring, behind the signature as in the corpus; an ending is the next words, as many
    for each choice. Endings that are equal count once, and where fewer than four are left there is no choice.
    """
    parted = {member["name"]: parts for member in members if (parts := _parted_definition(member))}
    return [
        row
        for name, (context, ending) in parted.items()
        if (row := _choice(name, context, ending, [other for _, other in parted.values()]))
    ]


def _parted_definition(member: Mapping[str, str]) -> tuple[str, str] | None:
    """The beginning and the ending of a docstring, cut at a space between words, or None where it is too short."""
    words = member["docstring"].split(" ")
    at = min(len(words) // 2, CONTEXT_WORDS.stop - 1)
    ending = " ".join(words[at : at + ENDING_WORDS]).strip()
    if at < CONTEXT_WORDS.start or len(ending.split()) < ENDING_WORDS // 2:
        return None
    return f"{member['signature']}\n{' '.join(words[:at])}".strip(), ending


def _choice(name: str, context: str, ending: str, others: Sequence[str]) -> dict[str, Any] | None:
    wrong = sorted({other for other in others if other != ending}, key=lambda other: _shuffled_endings(name, other))
    if len(wrong) < ENDINGS - 1:
        return None
    endings = sorted([ending, *wrong[: ENDINGS - 1]], key=lambda other: _shuffled_endings(name, "order", other))
    return {"id": name, "context": context, "endings": endings, "label": endings.index(ending)}


def _shuffled_endings(*parts: str) -> bytes:
    """A sort key without any order in it, the same on every machine."""
    return blake2b("\n".join(parts).encode()).digest()
