"""Results on paper: paired differences, tables, JSON, and what a card says."""

import json
import math
import random
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from huggingface_hub.repocard_data import model_index_to_eval_results

from fgpt_hf.evaluation import TaskResult
from fgpt_hf.results import as_json, cut_notes, differences, differences_table, results_table, write_to_card


def result(task: str = "hellaswag", seed: int = 0, count: int = 200, shift: float = 0.0, cut: int = 0) -> TaskResult:
    """A benchmark whose examples are hard or easy for every model alike, and a model `shift` better at them."""
    source, own = random.Random(0), random.Random(seed)
    ease = [source.random() for _ in range(count)]
    hits = [float(value + shift + 0.1 * own.random() > 0.5) for value in ease]
    return TaskResult(task, "acc_norm", {"acc": hits, "acc_norm": hits}, cut, 4.0)


def test_a_paired_difference_is_exact_and_its_error_smaller_than_that_of_two_results() -> None:
    first, second = result(seed=1), result(seed=2, shift=0.1)
    for row in differences([first], [second]):
        assert row.value == pytest.approx(second.values[row.measure] - first.values[row.measure])
        apart = math.hypot(*(one.values[f"{row.measure}_stderr"] for one in (first, second)))
        assert 0 < row.error < apart / 2


def test_a_model_does_not_differ_from_itself() -> None:
    assert {(row.value, row.error) for row in differences([result()], [result()])} == {(0.0, 0.0)}


def test_tables_have_a_line_for_each_measure() -> None:
    table = results_table([result()]).splitlines()
    assert [line.split()[:3] for line in table[1:]] == [["hellaswag", "200", "acc"], ["hellaswag", "200", "acc_norm"]]
    (line, _) = differences_table(["a", "b"], differences([result(seed=1)], [result(seed=2)])).splitlines()[1:]
    assert len(line.split()) == 6


def test_json_says_what_the_numbers_need_to_be_trusted() -> None:
    written = json.loads(json.dumps(as_json([result(), result("piqa=mine.jsonl")], {"seed": 7})))
    assert written["settings"] == {"seed": 7, "limit": None}
    assert set(written["conventions"]) == {"acc", "acc_norm"}
    assert written["versions"]["torch"] and written["versions"]["transformers"]
    assert set(written["tasks"]["hellaswag"]) == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"}
    assert written["runs"]["piqa=mine.jsonl"]["examples"] == 200
    assert written["runs"]["hellaswag"]["examples_per_second"] == 50


def test_json_names_the_data_sets_that_were_gone_through_whole() -> None:
    results = [result(), result("pydocs-choice"), result("piqa=mine.jsonl")]
    dataset = {"id": "Rowan/hellaswag", "task_id": "hellaswag", "split": "validation"}
    assert as_json(results, {})["datasets"] == {"hellaswag": dataset}
    assert as_json(results, {}, limit=200)["datasets"] == {}


def test_cut_contexts_are_said() -> None:
    assert cut_notes({"tiny": [result(), result(cut=3)]}) == [
        "hellaswag: 3 contexts, counted once for each ending, were longer than tiny reads and lost their beginning"
    ]


def test_a_card_gets_the_results_in_both_places(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n\nIts own words.\n", encoding="utf-8")
    write_to_card(tmp_path, [result(), result("pydocs-choice")])
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "mit" and "Its own words." in card.content
    _, entries = model_index_to_eval_results(card.data.to_dict()["model-index"])
    found = {(entry.dataset_type, entry.metric_type): entry.metric_value for entry in entries}
    assert found[("Rowan/hellaswag", "acc_norm")] == pytest.approx(result().values["acc_norm"])
    assert ("pydocs-choice", "acc") in found
    (entry,) = parse_eval_result_entries(yaml.safe_load((tmp_path / ".eval_results" / "hellaswag.yaml").read_text()))
    assert (entry.dataset_id, entry.task_id) == ("Rowan/hellaswag", "hellaswag")
    assert entry.value == found[("Rowan/hellaswag", "acc_norm")]


def test_only_whole_data_sets_of_the_hub_are_claimed_there(tmp_path: Path) -> None:
    write_to_card(tmp_path, [result(), result("piqa")], limit=200)
    write_to_card(tmp_path, [result("pydocs-choice"), result("piqa=mine.jsonl")])
    assert not (tmp_path / ".eval_results").exists()


def test_new_results_replace_old_ones_and_leave_others(tmp_path: Path) -> None:
    write_to_card(tmp_path, [result(), result("piqa")])
    write_to_card(tmp_path, [result(shift=0.3)])
    entries = ModelCard.load(tmp_path / "README.md").data.eval_results
    values = [(entry.dataset_type, entry.metric_type, entry.metric_value) for entry in entries]
    assert len(values) == 4
    assert ("Rowan/hellaswag", "acc", round(result(shift=0.3).values["acc"], 6)) in values
