"""The embedded preference pairs: what an object's docstring says of it, against a worse reply in one of two ways.

Half of the rejected replies are what another docstring of the module says: fluent, near the subject, and not true. The
others say the true thing over and over, as small models do. A pair is held out where base training holds out the
document that it is made of.
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
