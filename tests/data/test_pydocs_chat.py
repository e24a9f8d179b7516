"""The embedded conversations: prose only, the same on every machine, held out where base training holds out."""

import pytest

from fgpt_hf.data import pydocs_derived
from fgpt_hf.data.corpora import document_hash
from fgpt_hf.data.pydocs_derived import document_chats, first_sentence, load_pydocs_chat


def member(docstring: str, kind: str = "function", signature: str = "join(path, *paths)") -> dict[str, str]:
    return {"name": "os.path.join", "kind": kind, "signature": signature, "docstring": docstring}


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("Join one or more path segments. And more.", "Join one or more path segments."),
        ("Join one or more\n    path segments.\n\nMore.", "Join one or more path segments."),
        ("Return a numpy.ndarray of ones.\n\nMore.", "Return a numpy.ndarray of ones."),
        ("Join path segments\n\nWithout a stop.", None),
        ("lower case is often code.", None),
        (">>> join(1, 2) is a doctest.", None),
        ("Too short.", None),
        ("See :class:`Path` for what it is.", None),
        ("Title of a section\n==================\nand text.", None),
    ],
)
def test_an_answer_is_the_sentence_that_a_docstring_begins_with(docstring: str, sentence: str | None) -> None:
    assert first_sentence(docstring) == sentence


def test_a_function_is_asked_about_by_its_signature_and_others_by_name() -> None:
    text = "Join one or more path segments."
    members = [member(text), member(text, "class", "class join"), member(text, signature=f"join({'x' * 200})")]
    function, of_class, long = (row["messages"] for row in document_chats("document", members))
    assert "`join(path, *paths)`" in function[0]["content"] and function[1]["content"] == text
    assert "`os.path.join`" in of_class[0]["content"] and "`os.path.join`" in long[0]["content"]
    assert [message["role"] for message in function] == ["user", "assistant"]


def test_all_conversations_of_a_document_are_validation_together(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"Text {number} of a document." for number in range(9)]
    documents = [{"text": text, "members": [member(text), member(text, "class")]} for text in texts]
    monkeypatch.setattr(pydocs_derived, "load_pydocs", lambda: documents)
    rows = load_pydocs_chat()
    assert rows["document_hash"] == [document_hash(text) for text in texts for _ in range(2)]
    assert rows.to_list() == load_pydocs_chat().to_list()
