"""Rows of every usual form become the same pairs; rows that are none are counted, named and left out, or refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from fgpt_hf.config.runs import PreferenceRun
from fgpt_hf.data.mixtures import RowIssues
from fgpt_hf.data.preference_pairs import Pair, describe_pair_columns, load_pairs

PROMPT = {"role": "user", "content": "Say hello.\nIn French"}
FORMS: dict[str, dict[str, Any]] = {
    "Raschka's": {
        "instruction": "Say hello.",
        "input": "In French",
        "output": "x",
        "chosen": "Salut",
        "rejected": "Hi",
    },
    "text": {"prompt": PROMPT["content"], "chosen": "Salut", "rejected": "Hi"},
    "TRL's conversations": {
        "prompt": [PROMPT],
        "chosen": [{"role": "assistant", "content": "Salut"}],
        "rejected": [{"role": "assistant", "content": "Hi"}],
    },
    "UltraFeedback's": {
        "prompt": "whatever",
        "chosen": [PROMPT, {"role": "assistant", "content": "Salut"}],
        "rejected": [PROMPT, {"role": "assistant", "content": "Hi"}],
        "score_chosen": 8.0,
    },
    "without a prompt": {
        "chosen": [PROMPT, {"role": "assistant", "content": "Salut"}],
        "rejected": [PROMPT, {"role": "assistant", "content": "Hi"}],
    },
}


def run(folder: Path, rows: list[dict[str, Any]], **fields: Any) -> PreferenceRun:
    path = folder / "pairs.json"
    path.write_text(json.dumps(rows))
    return PreferenceRun(dataset_name=str(path), **fields)


def load(folder: Path, rows: list[dict[str, Any]], **fields: Any) -> tuple[list[Pair], RowIssues]:
    issues = RowIssues()
    return load_pairs(run(folder, rows, **fields), issues), issues


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_pair(form: str, tmp_path: Path) -> None:
    (pair,), issues = load(tmp_path, [FORMS[form]])
    assert (list(pair.prompt), pair.chosen, pair.rejected) == ([PROMPT], "Salut", "Hi")
    assert pair.conversations[1] == [PROMPT, {"role": "assistant", "content": "Hi"}]
    assert not len(issues)


@pytest.mark.parametrize(
    ("form", "where"),
    [
        ("Raschka's", "instruction and input"),
        ("TRL's conversations", "prompt"),
        ("without a prompt", "the messages before them"),
    ],
)
def test_the_columns_that_are_read_are_said(form: str, where: str, tmp_path: Path) -> None:
    described = describe_pair_columns(run(tmp_path, [FORMS[form]]))
    assert described.endswith(f"pairs.json: replies are read from chosen and rejected, their prompt from {where}")
    with pytest.raises(ValueError, match="has the columns text; pairs are in chosen and rejected"):
        describe_pair_columns(run(tmp_path, [{"text": "none"}]))


def test_pairs_of_one_prompt_are_validation_together(tmp_path: Path) -> None:
    pairs, _ = load(tmp_path, [FORMS["text"], FORMS["text"] | {"chosen": "Bonjour"}])
    assert pairs[0].hash_fraction == pairs[1].hash_fraction


BAD = {
    "'chosen' equals 'rejected'": {"prompt": "a", "chosen": "b", "rejected": "b"},
    "'rejected' is missing or empty": {"prompt": "a", "chosen": "b", "rejected": " "},
    "'chosen' is missing or empty": {"prompt": "a", "chosen": None, "rejected": "b"},
    "'prompt' is missing or empty": {"prompt": "", "chosen": "c", "rejected": "b"},
}


def test_bad_rows_are_counted_named_and_left_out(tmp_path: Path) -> None:
    pairs, issues = load(tmp_path, [*BAD.values(), FORMS["text"]])  # type: ignore[list-item]
    assert len(pairs) == 1 and len(issues) == len(BAD)
    for number, reason in enumerate(BAD):
        assert f"1 left out, {reason}: row {number} of {tmp_path / 'pairs.json'}" in str(issues)


@pytest.mark.parametrize("reason", BAD)
def test_bad_rows_are_refused_where_they_are_to_be(reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"row 1 of .*{reason}"):
        load(tmp_path, [FORMS["text"], BAD[reason]], bad_rows="refuse")  # type: ignore[list-item]


def test_replies_to_different_messages_and_replies_of_the_user_are_no_pairs(tmp_path: Path) -> None:
    good = FORMS["without a prompt"]
    other = {"chosen": good["chosen"], "rejected": [PROMPT | {"content": "else"}, *good["rejected"][1:]]}
    users = {name: [PROMPT, PROMPT | {"content": name}] for name in ("chosen", "rejected")}
    pairs, issues = load(tmp_path, [good, other, users])
    assert len(pairs) == 1
    assert "'chosen' and 'rejected' are not replies to the same messages: row 1" in str(issues)
    assert "'chosen' does not end in a reply of the assistant: row 2" in str(issues)


@pytest.mark.parametrize("row", [{"chosen": "b", "rejected": "c"}, {"instruction": "a", "output": "b"}])
def test_columns_that_hold_no_pairs_are_named(row: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"has the columns {', '.join(row)}; pairs are in chosen and rejected"):
        load(tmp_path, [row])


def test_an_unknown_name_is_answered_with_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="preference data .* give one of pydocs-preference, rasbt-preference"):
        load_pairs(PreferenceRun(dataset_name="no such/name at all"), RowIssues())


def test_replies_that_are_numbers_are_left_out_and_named(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "chosen": 1, "rejected": 2}\n')
    issues = RowIssues()
    assert not load_pairs(PreferenceRun(dataset_name=str(tmp_path / "rows.jsonl")), issues)
    assert "'chosen' is neither text nor messages with role and content: row 0" in str(issues)
