"""Results on paper: paired differences, tables and JSON."""

import json
import math
import random

import pytest

from fgpt_hf.evaluation.benchmark import TaskResult
from fgpt_hf.evaluation.results import contexts_cut_notes, differences, differences_table, results_record, results_table


def result(task: str = "hellaswag", seed: int = 0, count: int = 200, shift: float = 0.0, cut: int = 0) -> TaskResult:
    """A benchmark whose examples are hard or easy for every model alike, and a model `shift` better at them."""
    source, own = random.Random(0), random.Random(seed)
    ease = [source.random() for _ in range(count)]
    hits = [float(value + shift + 0.1 * own.random() > 0.5) for value in ease]
    return TaskResult(task, "acc_norm", {"acc": hits, "acc_norm": hits}, cut, 4.0)


def test_a_paired_difference_is_exact_and_its_error_smaller_than_that_of_two_results() -> None:
    first, second = result(seed=1), result(seed=2, shift=0.1)
    for row in differences([first], [second]):
        assert row.value == pytest.approx(second.metrics[row.metric] - first.metrics[row.metric])
        apart = math.hypot(*(one.metrics[f"{row.metric}_stderr"] for one in (first, second)))
        assert row.stderr is not None and 0 < row.stderr < apart / 2


def test_a_model_does_not_differ_from_itself() -> None:
    assert {(row.value, row.stderr) for row in differences([result()], [result()])} == {(0.0, 0.0)}


def test_the_difference_at_one_example_has_no_error_in_json() -> None:
    (row, _) = differences([result(count=1)], [result(count=1)])
    assert json.loads(json.dumps(row.to_json(), allow_nan=False))["stderr"] is None


def test_tables_have_a_line_for_each_metric() -> None:
    table = results_table([result()]).splitlines()
    assert [line.split()[:3] for line in table[1:]] == [["hellaswag", "200", "acc"], ["hellaswag", "200", "acc_norm"]]
    (line, _) = differences_table(["a", "b"], differences([result(seed=1)], [result(seed=2)])).splitlines()[1:]
    assert len(line.split()) == 6


def test_json_says_what_the_numbers_need_to_be_trusted() -> None:
    written = json.loads(json.dumps(results_record([result(), result("piqa=mine.jsonl")], {"seed": 7}).to_json()))
    assert written["settings"] == {"seed": 7, "limit": None}
    assert set(written["conventions"]) == {"acc", "acc_norm"}
    assert written["versions"]["torch"] and written["versions"]["transformers"]
    assert set(written["tasks"]["hellaswag"]) == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"}
    assert written["runs"]["piqa=mine.jsonl"]["examples"] == 200
    assert written["runs"]["hellaswag"]["examples_per_second"] == 50


def test_json_names_the_data_sets_that_were_gone_through_whole() -> None:
    results = [result(), result("pydocs-choice"), result("piqa=mine.jsonl")]
    dataset = {"id": "Rowan/hellaswag", "config": None, "task_id": "hellaswag", "split": "validation"}
    assert results_record(results, {}).to_json()["datasets"] == {"hellaswag": dataset}
    assert results_record(results, {}, limit=200).to_json()["datasets"] == {}


def test_cut_contexts_are_said() -> None:
    assert contexts_cut_notes({"tiny": [result(), result(cut=3)]}) == [
        "hellaswag: 3 contexts, counted once for each ending, were longer than tiny reads and lost their beginning"
    ]
