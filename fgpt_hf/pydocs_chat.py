"""The embedded conversations: what a documented object is for, asked in several ways and answered by its docstring.

Made from the embedded corpus. A conversation is held out where base training holds out the document that it is made of.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from datasets import Dataset

from fgpt_hf.corpora import document_hash
from fgpt_hf.pydocs import load_pydocs

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
