"""Make three small datasets from the embedded corpus: conversations, preference pairs and a multiple-choice benchmark.

None needs a network, and all are the same for the same installed packages. They follow the documents' split: what is
made from a document carries that document's hash, so it is held out where base training holds out the document.

- `pydocs-chat`: what a documented object is for, answered by the first sentence of its docstring.
- `pydocs-preference`: the same questions; the sentence is preferred to that of another object, or to a loop.
- `pydocs-choice`: how a docstring continues after its first half, with four endings from one module.

They show whether training works, not how good a model is: the answers repeat the corpus. For real tuning use the
datasets of `sources.CONVERSATIONS`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Any, TypeAlias

from datasets import Dataset

from fgpt_hf.data.pydocs import load_pydocs
from fgpt_hf.data.splits import document_hash

MemberFields: TypeAlias = Mapping[str, str]  # the fields of a `pydocs.Member`
DerivedRow: TypeAlias = dict[str, Any]

ANSWER_WORDS = range(4, 41)  # shorter first sentences say nothing, longer ones are seldom sentences
MAX_SIGNATURE_CHARACTERS = 120
# Prose up to its first full stop: it may continue over line ends, but not over an empty line.
SENTENCE = re.compile(r"[A-Z][^\n]*?(?:\n(?!\s*\n)[^\n]*?)*?[.!?](?=\s|\Z)")
# Signs of code, headings, tables, directives and tests.
MARKUP = re.compile(r">>>|:\w+:`|::|\.\. |==|--|\*\*|[|{}<>\\@]|https?:")
QUESTIONS: Mapping[str, Sequence[str]] = {
    "module": ("What is the module `{}` for?", "What does the module `{}` hold?"),
    "class": ("What is `{}`?", "What is the class `{}` for?"),
    "function": ("What does `{}` do?", "What is the function `{}` for?"),
    "method": ("What does `{}` do?", "What is the method `{}` for?"),
}
VALIDATION_FRACTION = 0.01  # the default of base training; a larger fraction holds these documents out too
ENDINGS = 4
CONTEXT_WORDS = range(8, 48)  # of the first half of a docstring
ENDING_WORDS = 8


# Conversations


def load_pydocs_chat() -> Dataset:
    """Return rows of `messages` and `document_hash`."""
    return Dataset.from_list(
        [row for document in load_pydocs() for row in document_chats(document["text"], document["members"])]
    )


def document_chats(text: str, members: Sequence[MemberFields]) -> Iterator[DerivedRow]:
    """Yield a conversation for each member of a document whose docstring begins with a sentence."""
    hash_of_document = document_hash(text)
    for member in members:
        if (answer := first_sentence(member["docstring"])) is not None:
            forms = QUESTIONS[member["kind"]]
            question = forms[int(document_hash(member["name"]) * len(forms))].format(_display_name(member))
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            yield {"messages": messages, "document_hash": hash_of_document}


def first_sentence(docstring: str) -> str | None:
    r"""Return the sentence that a docstring begins with, on one line, or None if it begins with something else.

    Example:
        >>> first_sentence("Join one or more\n    path segments. And more.")
        'Join one or more path segments.'
    """
    found = SENTENCE.match(docstring)
    words = found[0].split() if found else []
    return " ".join(words) if len(words) in ANSWER_WORDS and not MARKUP.search(" ".join(words)) else None


def _display_name(member: MemberFields) -> str:
    """Return a function's signature if it is short, or else the dotted name."""
    signature = member["signature"].removeprefix("async ")
    is_short = member["kind"] in ("function", "method") and len(signature) <= MAX_SIGNATURE_CHARACTERS
    return signature if is_short else member["name"]


# Preference pairs


def load_pydocs_preference() -> Dataset:
    """Return rows of `prompt`, `chosen`, `rejected` and `document_hash`, each prompt once."""
    by_prompt: dict[str, DerivedRow] = {}
    for document in load_pydocs():
        for row in document_pairs(document["text"], document["members"]):
            by_prompt.setdefault(row["prompt"], row)
    return Dataset.from_list(list(by_prompt.values()))


def document_pairs(text: str, members: Sequence[MemberFields]) -> Iterator[DerivedRow]:
    """Yield a pair for each conversation about a document's members.

    Half of the rejected replies are the answer of another member, if there is one; the others are a loop.
    """
    chats = list(document_chats(text, members))
    answers = sorted({chat["messages"][1]["content"] for chat in chats})
    for chat in chats:
        question, answer = (message["content"] for message in chat["messages"])
        draw = document_hash(question)
        others = [other for other in answers if other != answer]
        rejected = others[int(2 * draw * len(others))] if draw < 0.5 and others else looping_reply(answer)
        yield {"prompt": question, "chosen": answer, "rejected": rejected, "document_hash": chat["document_hash"]}


def looping_reply(sentence: str) -> str:
    """Return the sentence as a model would write it that does not get past the middle.

    Example:
        >>> looping_reply("One two three four.")
        'One two One two One two One two'
    """
    words = sentence.split()
    middle = max(2, len(words) // 2)
    return " ".join([*words[:middle], *words[max(0, middle - 3) : middle] * 3])


# Multiple choice


def load_pydocs_choice() -> list[DerivedRow]:
    """Return rows of `id`, `context`, `endings` and `label`, of the documents that base training holds out."""
    documents = ((document_hash(document["text"]), document) for document in load_pydocs())
    validation = sorted((item for item in documents if item[0] < VALIDATION_FRACTION), key=lambda item: item[0])
    return [row for _, document in validation for row in module_choices(document["members"])]


def module_choices(members: Sequence[MemberFields]) -> list[DerivedRow]:
    """Return a row for each docstring of a module that is long enough.

    The context is about half a docstring, after its signature as in the corpus; an ending is the next words, as many
    in each. Equal endings count once, and a docstring with fewer than three others has no row.
    """
    halves = {member["name"]: parts for member in members if (parts := _split_definition(member))}
    return [
        row
        for name, (context, ending) in halves.items()
        if (row := _choice(name, context, ending, [other for _, other in halves.values()]))
    ]


def _split_definition(member: MemberFields) -> tuple[str, str] | None:
    """Return the context and the ending of a docstring, cut between words, or None if it is too short."""
    words = member["docstring"].split(" ")
    middle = min(len(words) // 2, CONTEXT_WORDS.stop - 1)
    ending = " ".join(words[middle : middle + ENDING_WORDS]).strip()
    if middle < CONTEXT_WORDS.start or len(ending.split()) < ENDING_WORDS // 2:
        return None
    return f"{member['signature']}\n{' '.join(words[:middle])}".strip(), ending


def _choice(name: str, context: str, ending: str, others: Sequence[str]) -> DerivedRow | None:
    wrong = sorted({other for other in others if other != ending}, key=lambda other: _shuffle_key(name, other))
    if len(wrong) < ENDINGS - 1:
        return None
    endings = sorted([ending, *wrong[: ENDINGS - 1]], key=lambda other: _shuffle_key(name, "order", other))
    return {"id": name, "context": context, "endings": endings, "label": endings.index(ending)}


def _shuffle_key(*parts: str) -> bytes:
    """Return a sort key without any order in it, the same on every machine."""
    return blake2b("\n".join(parts).encode()).digest()
