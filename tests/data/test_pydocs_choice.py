"""The embedded benchmark: the same on every machine, fair, and unseen in training."""

from collections import Counter

import pytest

from fgpt_hf.config.runs import BaseRun
from fgpt_hf.data import pydocs_derived
from fgpt_hf.data.corpora import document_hash
from fgpt_hf.data.pydocs_derived import ENDING_WORDS, ENDINGS, VALIDATION_FRACTION, load_pydocs_choice, module_choices


def member(name: str, docstring: str) -> dict[str, str]:
    return {"name": f"m.{name}", "kind": "function", "signature": f"{name}(x)", "docstring": docstring}


def words(letter: str, count: int) -> str:
    return " ".join(f"{letter}{number}" for number in range(count))


MEMBERS = [member(letter, words(letter, 24)) for letter in "abcdef"]


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
    members = [member(f"f{number}", words(f"w{number}x", 24)) for number in range(400)]
    counts = Counter(row["label"] for row in module_choices(members))
    assert sorted(counts) == [0, 1, 2, 3] and min(counts.values()) > 70


def test_short_docstrings_and_equal_endings_are_left_out() -> None:
    short = member("short", words("s", 9))
    twin = [member(f"twin{number}", f"{words(f't{number}x', 12)} {words('t', 12)}") for number in range(6)]
    assert module_choices([*MEMBERS[:3], short]) == []
    assert module_choices(twin) == []


def test_only_documents_that_base_training_holds_out_are_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [{"id": f"d{number}", "text": f"text {number}", "members": MEMBERS} for number in range(500)]
    monkeypatch.setattr(pydocs_derived, "load_pydocs", lambda: documents)
    validation = [document for document in documents if document_hash(document["text"]) < VALIDATION_FRACTION]
    assert len(load_pydocs_choice()) == len(validation) * len(MEMBERS) > 0
    assert BaseRun().validation_fraction == VALIDATION_FRACTION
