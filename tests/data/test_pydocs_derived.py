"""The datasets made of the embedded corpus: the same on every machine, and held out where base training holds out."""

from collections import Counter

import pytest

from fgpt_hf.config.runs import BaseRun
from fgpt_hf.data import pydocs_derived
from fgpt_hf.data.pydocs_derived import (
    ENDING_WORDS,
    ENDINGS,
    VALIDATION_FRACTION,
    document_chats,
    document_pairs,
    first_sentence,
    load_pydocs_chat,
    load_pydocs_choice,
    load_pydocs_preference,
    looping_reply,
    module_choices,
)
from fgpt_hf.data.splits import document_hash

# conversations


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


# pairs

SHOP = [
    {"name": "shop.buy", "kind": "function", "signature": "buy(thing)", "docstring": "Exchange money for a thing."},
    {"name": "shop.sell", "kind": "function", "signature": "sell(thing)", "docstring": "Exchange a thing for money."},
    {"name": "shop.close", "kind": "function", "signature": "close()", "docstring": "Let nobody in any more.\n\nNow."},
    {"name": "shop.x", "kind": "function", "signature": "x()", "docstring": ">>> x()"},
]


def test_the_chosen_reply_is_the_objects_own_and_the_rejected_one_a_neighbours_or_goes_in_circles() -> None:
    pairs = list(document_pairs("shop", SHOP))
    own = [member["docstring"].split("\n")[0] for member in SHOP[:3]]
    assert [pair["chosen"] for pair in pairs] == own
    for pair in pairs:
        assert pair["rejected"] in {*own, looping_reply(pair["chosen"])} - {pair["chosen"]}
    assert pairs == list(document_pairs("shop", SHOP))


def test_an_object_without_another_answer_beside_it_is_not_compared_with_its_own() -> None:
    twins = [SHOP[0], SHOP[0] | {"name": "shop.get", "signature": "get(thing)"}]
    assert {pair["rejected"] for pair in document_pairs("shop", twins)} == {
        looping_reply("Exchange money for a thing.")
    }


def test_a_reply_in_circles_does_not_get_past_the_middle_of_the_sentence() -> None:
    assert looping_reply("One two three four five six seven eight.") == "One two three four" + " two three four" * 3


@pytest.mark.slow
def test_the_installed_packages_give_thousands_of_pairs_and_no_question_twice() -> None:
    pairs = load_pydocs_preference()
    assert len(pairs) > 1000
    assert len(set(pairs["prompt"])) == len(pairs)
    circles = sum(
        looping_reply(chosen) == reply for chosen, reply in zip(pairs["chosen"], pairs["rejected"], strict=True)
    )
    assert 0.4 < circles / len(pairs) < 0.7
    assert all(chosen != rejected for chosen, rejected in zip(pairs["chosen"], pairs["rejected"], strict=True))


# multiple choice


def documented(name: str, docstring: str) -> dict[str, str]:
    return {"name": f"m.{name}", "kind": "function", "signature": f"{name}(x)", "docstring": docstring}


def words(letter: str, count: int) -> str:
    return " ".join(f"{letter}{number}" for number in range(count))


MEMBERS = [documented(letter, words(letter, 24)) for letter in "abcdef"]


def test_a_choice_is_between_the_right_ending_and_three_siblings() -> None:
    rows = module_choices(MEMBERS)
    assert [row["id"] for row in rows] == [f"m.{letter}" for letter in "abcdef"]
    for row, letter in zip(rows, "abcdef", strict=True):
        assert row["context"] == f"{letter}(x)\n{words(letter, 12)}"
        assert row["endings"][row["label"]] == " ".join(words(letter, 24).split()[12 : 12 + ENDING_WORDS])
        assert len({ending[0] for ending in row["endings"]}) == ENDINGS


def test_it_is_made_the_same_way_each_time_and_whatever_the_order() -> None:
    by_name = {row["id"]: row for row in module_choices(MEMBERS)}
    assert {row["id"]: row for row in module_choices(MEMBERS[::-1])} == by_name


def test_labels_are_spread_over_the_places() -> None:
    members = [documented(f"f{number}", words(f"w{number}x", 24)) for number in range(400)]
    counts = Counter(row["label"] for row in module_choices(members))
    assert sorted(counts) == [0, 1, 2, 3] and min(counts.values()) > 70


def test_short_docstrings_and_equal_endings_are_left_out() -> None:
    short = documented("short", words("s", 9))
    twin = [documented(f"twin{number}", f"{words(f't{number}x', 12)} {words('t', 12)}") for number in range(6)]
    assert module_choices([*MEMBERS[:3], short]) == []
    assert module_choices(twin) == []


def test_only_documents_that_base_training_holds_out_are_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [{"id": f"d{number}", "text": f"text {number}", "members": MEMBERS} for number in range(500)]
    monkeypatch.setattr(pydocs_derived, "load_pydocs", lambda: documents)
    validation = [document for document in documents if document_hash(document["text"]) < VALIDATION_FRACTION]
    assert len(load_pydocs_choice()) == len(validation) * len(MEMBERS) > 0
    assert BaseRun().validation_fraction == VALIDATION_FRACTION
