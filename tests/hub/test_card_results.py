"""Measurements in the Hub's two forms: what an evaluation writes into a model's folder."""

from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from huggingface_hub.repocard_data import model_index_to_eval_results

from fgpt_hf.evaluation.results import results_record
from fgpt_hf.hub.card_results import write_to_card
from tests.evaluation.test_results import result


def test_a_card_gets_the_results_in_both_places(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n\nIts own words.\n", encoding="utf-8")
    write_to_card(tmp_path, results_record([result(), result("pydocs-choice")], {}))
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "mit" and "Its own words." in card.content
    _, entries = model_index_to_eval_results(card.data.to_dict()["model-index"])
    found = {(entry.dataset_type, entry.metric_type): entry.metric_value for entry in entries}
    assert found[("Rowan/hellaswag", "acc_norm")] == pytest.approx(result().metrics["acc_norm"])
    assert ("pydocs-choice", "acc") in found
    (entry,) = parse_eval_result_entries(yaml.safe_load((tmp_path / ".eval_results" / "hellaswag.yaml").read_text()))
    assert (entry.dataset_id, entry.task_id) == ("Rowan/hellaswag", "hellaswag")
    assert entry.value == found[("Rowan/hellaswag", "acc_norm")]


def test_only_whole_data_sets_of_the_hub_are_claimed_there(tmp_path: Path) -> None:
    write_to_card(tmp_path, results_record([result(), result("piqa")], {}, limit=200))
    write_to_card(tmp_path, results_record([result("pydocs-choice"), result("piqa=mine.jsonl")], {}))
    assert not (tmp_path / ".eval_results").exists()


def test_new_results_replace_old_ones_and_leave_others(tmp_path: Path) -> None:
    write_to_card(tmp_path, results_record([result(), result("piqa")], {}))
    write_to_card(tmp_path, results_record([result(shift=0.3)], {}))
    entries = ModelCard.load(tmp_path / "README.md").data.eval_results
    values = [(entry.dataset_type, entry.metric_type, entry.metric_value) for entry in entries]
    assert len(values) == 4
    assert ("Rowan/hellaswag", "acc", result(shift=0.3).metrics["acc"]) in values
