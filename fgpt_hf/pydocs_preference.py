"""The embedded preference pairs: of two first sentences from one module, the one that is about the object in question.

Made from the embedded conversations: both replies are fluent and near the subject, so that what is to be preferred is
the truth. A pair is held out where base training holds out the document that it is made of.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from datasets import Dataset

from fgpt_hf.corpora import document_hash
from fgpt_hf.pydocs import load_pydocs
from fgpt_hf.pydocs_chat import document_chats


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
    """A pair for each conversation about a document's members that has another answer beside it."""
    chats = list(document_chats(text, members))
    answers = sorted({chat["messages"][1]["content"] for chat in chats})
    for chat in chats:
        question, answer = (message["content"] for message in chat["messages"])
        if others := [other for other in answers if other != answer]:
            rejected = others[int(document_hash(question) * len(others))]
            place = chat["document_hash"]
            yield {"prompt": question, "chosen": answer, "rejected": rejected, "document_hash": place}
