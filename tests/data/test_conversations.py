"""Rows of every form become the same messages; what is no conversation is counted and named."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from fgpt_hf.config.presets import INSTRUCT_PRESETS
from fgpt_hf.config.runs import InstructRun
from fgpt_hf.data.conversations import (
    Conversation,
    best_paths,
    describe_layouts,
    instruction_message,
    load_conversations,
)
from fgpt_hf.data.mixtures import RowIssues
from fgpt_hf.errors import UserError

Row = dict[str, Any]


def turns(*contents: str | None, system: str | None = None) -> list[Row]:
    found = [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *found] if system is not None else found


def write(folder: Path, rows: Sequence[Row], name: str = "rows.json") -> Path:
    (folder / name).write_text(json.dumps(rows))
    return folder / name


def run_on(names: object, **fields: Any) -> InstructRun:
    return replace(INSTRUCT_PRESETS["quickstart"], dataset_name=str(names), **fields)


def load(names: object, **fields: Any) -> tuple[list[Conversation], RowIssues]:
    issues = RowIssues()
    return load_conversations(run_on(names, **fields), issues), issues


FORMS: dict[str, Row] = {
    "messages": {"messages": turns("2 + 2?\nTell me.", "4")},
    "a prompt and its completion": {"prompt": "2 + 2?\nTell me.", "completion": "4"},
    "messages that are one": {
        "prompt": turns("2 + 2?\nTell me."),
        "completion": [{"role": "assistant", "content": "4"}],
    },
    "the original's": {"instruction": "2 + 2?", "input": "Tell me.", "output": "4"},
    "the original's without input": {"instruction": "2 + 2?\nTell me.", "input": "", "output": "4"},
    "ShareGPT's": {
        "conversations": [{"from": "human", "value": "2 + 2?\nTell me."}, {"from": "gpt", "value": "4"}],
    },
    "a question and its answer": {"question": "2 + 2?\nTell me.", "answer": "4"},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_row_gives_the_same_messages(tmp_path: Path, form: str) -> None:
    (found,), issues = load(write(tmp_path, [FORMS[form]]))
    assert found.messages == turns("2 + 2?\nTell me.", "4") and not len(issues)


def test_a_line_may_be_a_bare_list_of_messages(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(turns("2 + 2?", "4")) + "\n")
    (found,), issues = load(tmp_path / "rows.jsonl")
    assert found.messages == turns("2 + 2?", "4") and not len(issues)


def test_an_empty_system_message_says_nothing_and_a_real_one_stays(tmp_path: Path) -> None:
    rows = [{"messages": turns("a", "b", system="")}, {"messages": turns("a", "b", system="Be brief.")}]
    empty, real = load(write(tmp_path, rows))[0]
    assert empty.messages == turns("a", "b") and real.messages == turns("a", "b", system="Be brief.")


BAD: dict[str, Row] = {
    "'output' is missing or empty": {"instruction": "a", "input": "", "output": " "},
    "'instruction' is missing or empty": {"instruction": None, "input": "a", "output": "b"},
    "'completion' is missing or empty": {"prompt": "a", "completion": ""},
    "message 2 is missing or empty": {"messages": turns("a", None)},
    "message 1 has speaker, text instead of role and content": {"messages": [{"speaker": "Ann", "text": "a"}]},
    "no message is the assistant's, only of user": {"messages": turns("a")},
}


@pytest.mark.parametrize("reason", BAD)
def test_a_row_that_is_no_conversation_is_counted_and_named_or_refused(tmp_path: Path, reason: str) -> None:
    good = {name: "fine" for name in BAD[reason]} if "messages" not in BAD[reason] else {"messages": turns("a", "b")}
    other = {name: "fine too" for name in good} if "messages" not in good else {"messages": turns("a", "c")}
    path = write(tmp_path, [good, BAD[reason], other, BAD[reason]])
    found, issues = load(path)
    assert [conversation.row_id for conversation in found] == [f"row {n} of {path}" for n in (0, 2)]
    assert str(issues) == f"2 left out, {reason}: row 1 of {path}, row 3 of {path}"
    with pytest.raises(ValueError, match=f"row 1 of .*: {reason}"):
        load(path, bad_rows="refuse")


def test_roles_may_have_the_names_that_other_datasets_give_them(tmp_path: Path) -> None:
    messages = [{"role": "Human", "content": "a"}, {"role": "AI", "content": "b"}]
    (found,), _ = load(write(tmp_path, [{"messages": messages}]))
    assert found.messages == turns("a", "b")


def test_columns_without_conversations_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has the columns question, reply; conversations are in a column messages"):
        load(write(tmp_path, [{"question": "a", "reply": "b"}]))


def test_the_columns_that_are_read_are_said(tmp_path: Path) -> None:
    path = write(tmp_path, [{"messages": turns("a", "b")}, {"question": "a", "answer": "c"}])
    assert describe_layouts(run_on(path)) == f"{path}: conversations are read from messages; question and answer"


def test_a_mixture_takes_a_random_choice_that_is_always_the_same(tmp_path: Path) -> None:
    many = write(tmp_path, [{"prompt": f"a{n}", "completion": "b"} for n in range(200)])
    few = write(tmp_path, [{"messages": turns("c", "d")}], "few.json")
    found, _ = load(f"{many}:50,{few}*3")
    assert len(found) == 51 and [c.repeats for c in found] == [1.0] * 50 + [3.0]
    assert found == load(f"{many}:50,{few}*3")[0]
    numbers = [int(c.messages[0]["content"][1:]) for c in found[:50]]
    assert numbers == sorted(numbers) and numbers[-1] > 100


def test_the_same_conversation_has_the_same_hash_wherever_it_stands(tmp_path: Path) -> None:
    rows = [{"prompt": f"a{n}", "completion": "b"} for n in range(50)]
    there, _ = load(write(tmp_path, rows))
    here, _ = load(write(tmp_path, rows[::-1], "turned.json"))
    assert [c.hash_fraction for c in there] == [c.hash_fraction for c in here][::-1]
    assert len({c.hash_fraction for c in there}) == 50 and all(0 <= c.hash_fraction < 1 for c in there)


def test_of_a_tree_the_best_replies_are_followed() -> None:
    def node(name: str, parent: str | None, role: str, rank: int | None = None, deleted: bool = False) -> Row:
        return {"message_id": name, "parent_id": parent, "role": role, "text": name, "rank": rank, "deleted": deleted}

    rows = [
        node("question", None, "prompter"),
        node("worse", "question", "assistant", 1),
        node("better", "question", "assistant", 0),
        node("gone", "question", "assistant", -1, deleted=True),
        node("thanks", "better", "prompter"),
        node("another", None, "prompter"),
        node("unranked", "another", "assistant"),
        node("unranked too", "another", "assistant"),
    ]
    found = best_paths(Dataset.from_list(rows))
    assert found["messages"] == [turns("question", "better", "thanks"), turns("another", "unranked")]


@pytest.mark.parametrize("row", [{"messages": "hello"}, {"messages": [5]}, {"prompt": 5, "completion": "x"}])
def test_a_row_of_another_type_is_left_out_and_named(row: Row, tmp_path: Path) -> None:
    conversations, issues = load(write(tmp_path, [row]))
    assert not conversations and "row 0 of" in str(issues)


@pytest.mark.parametrize("row", [{"instruction": True, "input": "a"}, {"instruction": "a", "input": ["b"]}])
def test_an_instruction_that_is_no_text_is_refused(row: Row) -> None:
    with pytest.raises(UserError, match="'instruction' or 'input' is not text"):
        instruction_message(row)
