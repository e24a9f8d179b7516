"""Tasks: the harness' texts and labels for each, from its datasets' rows, and one line for rows that cannot be."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fgpt_hf.evaluation.tasks import TASKS, Example, load_examples
from tests.support.loopback_hub import LoopbackHub, hub_environment
from tests.support.tiny import tokenizer

HELLASWAG = {
    "activity_label": "Roof  repair",
    "ctx_a": "A man is on a roof [header] .",
    "ctx_b": "HE",
    "ctx": "A man is on a roof [header] . HE",
    "endings": ["falls [title] down.", "sings.", "[step] sits.", "paints  it."],
    "label": "2",
}
ARC = {"question": "Why?", "choices": {"text": ["so", "thus"], "label": ["1", "2"]}, "answerKey": "2"}
ROWS: dict[str, tuple[dict[str, Any], list[str], int]] = {
    "hellaswag": (
        HELLASWAG,
        [f"Roof repair: A man is on a roof . He {end}" for end in ("falls. down.", "sings.", " sits.", "paints it.")],
        2,
    ),
    "hellaswag_plain": (HELLASWAG, [f"{HELLASWAG['ctx']} {ending}" for ending in HELLASWAG["endings"]], 2),
    "piqa": (
        {"goal": "Boil water", "sol1": "heat it", "sol2": "cool it", "label": 0},
        ["Question: Boil water\nAnswer: heat it", "Question: Boil water\nAnswer: cool it"],
        0,
    ),
    "arc_easy": (ARC, ["Question: Why?\nAnswer: so", "Question: Why?\nAnswer: thus"], 1),
    "arc_challenge": (ARC, ["Question: Why?\nAnswer: so", "Question: Why?\nAnswer: thus"], 1),
    "openbookqa": (ARC | {"question_stem": "The sun", "answerKey": " 1"}, ["The sun so", "The sun thus"], 0),
    "commonsense_qa": (
        {"question": " Where? ", "choices": {"text": list("vwxyz"), "label": list("ABCDE")}, "answerKey": "E"},
        [f"Question: Where?\nA. v\nB. w\nC. x\nD. y\nE. z\nAnswer: {letter}" for letter in "ABCDE"],
        4,
    ),
    "winogrande": (
        {"sentence": "Ann met Bea and _ smiled at her.", "option1": "Ann", "option2": "Bea", "answer": "2"},
        ["Ann met Bea and Ann smiled at her.", "Ann met Bea and Bea smiled at her."],
        1,
    ),
    "lambada": ({"text": "She opened the door"}, ["She opened the door"], 0),
    "pydocs-choice": (
        {"context": "f(x)\nGive", "endings": ["a", "b"], "label": 1},
        ["f(x)\nGive a", "f(x)\nGive b"],
        1,
    ),
}


def load(tmp_path: Path, name: str, *rows: dict[str, Any], limit: int | None = None) -> list[Example]:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_examples(name, tokenizer(), str(file), limit)


@pytest.mark.parametrize("name", ROWS)
def test_what_is_scored_reads_as_in_the_harness(tmp_path: Path, name: str) -> None:
    row, texts, label = ROWS[name]
    (example,) = load(tmp_path, name, row)
    assert ["".join(pair) for pair in example.pairs] == texts
    assert example.label == label


def test_endings_are_measured_without_the_space_before_them(tmp_path: Path) -> None:
    (example,) = load(tmp_path, "lambada", {"text": "She opened the door"})
    assert example.endings == ["door"] and example.pairs == [("She opened the", " door")]


def test_winogrande_scores_what_follows_the_gap(tmp_path: Path) -> None:
    (example,) = load(tmp_path, "winogrande", ROWS["winogrande"][0])
    assert set(example.endings) == {"smiled at her."}


def test_a_hellaswag_file_may_have_the_context_in_one_piece(tmp_path: Path) -> None:
    row = {name: value for name, value in HELLASWAG.items() if name not in ("ctx_a", "ctx_b")}
    (example,) = load(tmp_path, "hellaswag", row)
    assert example.contexts[0] == "Roof repair: A man is on a roof . HE"


def test_letters_are_asked_for_in_a_chat(tmp_path: Path) -> None:
    (example,) = load(tmp_path, "hellaswag_letters", HELLASWAG)
    assert example.contexts[0].startswith("<|user|>\n") and example.contexts[0].endswith("<|end|>\n<|assistant|>\n")
    assert "C.  sits." in example.contexts[0]
    assert [ending for _, ending in example.pairs] == ["A", "B", "C", "D"]


def test_a_model_that_does_not_chat_is_not_asked_for_letters(tmp_path: Path) -> None:
    silent = type(tokenizer())(vocab=tokenizer().get_vocab(), merges=[])
    with pytest.raises(ValueError, match="the tokenizer has no chat template: try hellaswag"):
        load_examples("hellaswag_letters", silent, str(write(tmp_path, json.dumps(HELLASWAG))))


def test_a_question_is_asked_in_a_chat(tmp_path: Path) -> None:
    (example,) = load(tmp_path, "basic-qa", {"question": "Which city?", "answer": "Rome."})
    assert example.pairs == [("<|user|>\nWhich city?<|end|>\n<|assistant|>\n", "Rome.")]


def test_the_limit_takes_the_first(tmp_path: Path) -> None:
    rows = [{"text": f"The number {number}"} for number in range(5)]
    assert [example.endings for example in load(tmp_path, "lambada", *rows, limit=2)] == [["0"], ["1"]]


def test_any_text_file_is_one_document_and_json_lines_are_many(tmp_path: Path) -> None:
    (tmp_path / "book.md").write_text("One.\n\nTwo.\n", encoding="utf-8")
    (example,) = load_examples("pydocs-validation", tokenizer(), str(tmp_path / "book.md"))
    assert example.endings == ["One.\n\nTwo.\n"]
    assert len(load(tmp_path, "pydocs-validation", {"text": "One."}, {"text": "Two."})) == 2


def test_a_text_file_is_read_as_it_is_and_what_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_bytes(b"One.\r\nTwo.\r\n")
    (example,) = load_examples("pydocs-validation", tokenizer(), str(tmp_path / "book.txt"))
    assert example.endings == ["One.\r\nTwo.\r\n"]
    (tmp_path / "book.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"book\.txt is not UTF-8 text"):
        load_examples("pydocs-validation", tokenizer(), str(tmp_path / "book.txt"))


def test_only_line_feeds_part_the_rows_of_a_file(tmp_path: Path) -> None:
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in ("a\u2028b\u0085c", "d")]
    examples = load_examples("pydocs-validation", tokenizer(), str(write(tmp_path, "\r\n".join([*lines, "", ""]))))
    assert [example.endings for example in examples] == [["a\u2028b\u0085c"], ["d"]]


def test_half_a_character_is_read_as_in_training(tmp_path: Path) -> None:
    (example,) = load(tmp_path, "pydocs-validation", {"text": "a\ud800b"})
    assert example.endings == ["a\ufffdb"]


def write(folder: Path, text: str) -> Path:
    path = folder / "rows.jsonl"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "rows.jsonl holds no examples"),
        ("{", r"line 1: not JSON"),
        ("[1]", r"line 1: '\[1\]' is not an object with fields"),
        ('{"endings": ["a", "b"], "label": 0}', "example 1: the field 'context' is missing; it has endings, label"),
        ('{"context": "x", "endings": ["a", "b"], "label": 2}', "example 1: the label 2 is not one of 0 to 1"),
        ('{"context": "x", "endings": ["a", "b"], "label": -1}', "the label -1 is not one of 0 to 1"),
        ('{"context": "x", "endings": ["a", "b"], "label": ""}', "example 1: invalid literal"),
        ('{"context": "x", "endings": ["a", " "], "label": 0}', "example 1: an ending is empty"),
        ('{"context": "x", "endings": ["a", 2], "label": 0}', "example 1: 2 is not a text"),
        ('{"context": null, "endings": ["a", "b"], "label": 0}', "example 1: None is not a text"),
        ('{"context": "x", "endings": "ab", "label": 0}', "example 1: the endings must be a list of texts, not 'ab'"),
        ('{"context": "x", "endings": ["a", "a"], "label": 0}', "example 1: two endings are equal"),
        ('{"context": "x", "endings": 5, "label": 0}', "example 1: "),
    ],
)
def test_what_cannot_be_scored_is_refused_in_one_line(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem) as error:
        load_examples("pydocs-choice", tokenizer(), str(write(tmp_path, text)))
    assert "\n" not in str(error.value)


def test_unknown_tasks_and_files_are_refused() -> None:
    with pytest.raises(
        ValueError, match="unknown task 'helaswag': the tasks are pydocs-choice, pydocs-validation, basic-qa"
    ):
        load_examples("helaswag", tokenizer())
    with pytest.raises(ValueError, match="nowhere.jsonl: there is no such file"):
        load_examples("piqa", tokenizer(), "nowhere.jsonl")


FROM_HUB = """
import sys
from fgpt_hf.evaluation.tasks import load_examples
from tests.support.tiny import tokenizer
for name in sys.argv[1:]:
    print("".join(load_examples(name, tokenizer(), limit=1)[0].pairs[0]))
"""


@pytest.mark.slow
def test_rows_come_from_the_hub(hub_server: LoopbackHub, tmp_path: Path) -> None:
    """With the paths, the configurations and the splits of the table; a name in the configuration is a folder there."""
    names = ["hellaswag", "winogrande", "arc_challenge"]
    hub_server.add_repo("dataset", "Rowan/hellaswag", {"data/validation.jsonl": json.dumps(HELLASWAG)})
    card = "---\nconfigs:\n- config_name: {0}\n  data_files:\n  - split: {1}\n    path: rows.jsonl\n---\n"
    for name in names[1:]:
        source: Any = TASKS[name].source
        files = {"README.md": card.format(source.configuration, source.split), "rows.jsonl": json.dumps(ROWS[name][0])}
        hub_server.add_repo("dataset", source.path, files)
    environment = hub_environment(hub_server, tmp_path) | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", FROM_HUB, *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "".join(f"{ROWS[name][1][0]}\n" for name in names)
