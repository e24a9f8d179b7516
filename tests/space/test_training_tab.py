"""The card and the training tab: what is read of a model's record, and how it is laid out."""

import json
from pathlib import Path

import pytest

from card import Card
from tests.support.run_folders import METRICS, write_run
from training_tab import LOSS, few_points, lineage, plots_of, sample_cards, table


def test_the_record_is_read_from_the_repo_or_from_the_run_above(tmp_path: Path) -> None:
    assert Card(write_run(tmp_path / "run") / "model").metrics == METRICS
    (tmp_path / "metrics.jsonl").write_text(json.dumps(METRICS[0]) + "\n")
    assert Card(tmp_path).metrics == METRICS[:1] and Card(tmp_path).samples == [] and Card(tmp_path).text == ""


@pytest.mark.parametrize(
    "text",
    [
        "---\n- a list\n---\nwords",
        "---\na: [\n---\nwords",
        "---\n5\n---\nwords",
        "---\ntags: 5\nbase_model: {a: 1}\n---\nwords",
    ],
)
def test_a_card_that_is_no_card_is_its_words(text: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(text)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n[]\n{"step": "x"}\nnot json\n')
    card = Card(tmp_path)
    assert (card.text, card.tags, card.base_model, card.title) == ("words", [], "", "")
    assert card.metrics == [{"step": 1, "loss": 2.0}]


def test_a_card_in_another_encoding_is_read(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(b"# na\xefve\n")
    assert Card(tmp_path).title == "na\N{REPLACEMENT CHARACTER}ve"


def test_each_stage_of_a_chain_has_its_name_and_its_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = {
        "tester/preference": ("base_model: tester/instruct", {"step": 1, "rewards/margins": 0.2}),
        "tester/instruct": ("base_model: [tester/base]\ntags: [conversational]", {"step": 2, "loss": 2.0}),
        "tester/base": ("tags: [fgpt]", {"step": 3, "loss": 3.0}),
    }
    for name, (metadata, line) in records.items():
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "README.md").write_text(f"---\n{metadata}\n---\n# {name}\n")
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(line))
    monkeypatch.setattr("training_tab.fetch_record", lambda name: tmp_path / name)
    stages = lineage(Card(tmp_path / "tester/preference"))
    assert [(stage.title, stage.name, stage.card.metrics[0]["step"]) for stage in stages] == [
        ("Base training", "tester/base", 3),
        ("Instruction tuning", "tester/instruct", 2),
        ("Preference tuning", "tester/preference", 1),
    ]
    monkeypatch.setattr("training_tab.fetch_record", lambda name: None)
    served = lineage(Card(tmp_path / "tester/instruct"), Card(tmp_path / "tester/base"))
    assert [stage.title for stage in served] == ["Base training", "Instruction tuning"]
    assert [stage.title for stage in lineage(Card(tmp_path / "tester/base"))] == ["Base training"]


def test_samples_are_cards_without_markup() -> None:
    lines = [{"step": 1, "prompt": "<b>Once", "greedy": " a & b"}, {"step": 2, "prompt": "no"}]
    cards = sample_cards(lines, 1)
    assert cards.count("<article>") == 1 and "&lt;b&gt;Once" in cards and "<dt>greedy</dt><dd> a &amp; b</dd>" in cards


def test_a_plot_has_every_measured_point_and_of_many_evenly_some() -> None:
    loss = LOSS
    points = table(METRICS, loss)
    assert set(points["curve"]) == {"training", "validation"} and len(points) == 3
    many = table([{"step": step, "loss": 1.0} for step in range(5000)], loss)
    assert 500 <= len(many) <= 600 and many["step"].iloc[0] == 0


def test_a_preference_loss_is_per_pair_and_rewards_margins_and_shares_have_axes_of_their_own() -> None:
    lines = [{"step": 1, "loss": 0.69, "rewards/chosen": 0.1, "rewards/margins": 0.2, "rewards/accuracies": 0.5}]
    plots = {plot.title: plot for plot in plots_of(lines)}
    assert plots.keys() == {"Preference loss", "Rewards", "Margin", "Pairs ranked as people did"}
    assert plots["Preference loss"].unit == "per pair of replies"
    assert LOSS in plots_of(METRICS) and LOSS.unit == "nats per token"


def test_measures_of_a_benchmark_share_an_axis_only_if_both_are_shares() -> None:
    line = {"step": 1, "h/acc": 0.3, "h/acc_norm": 0.4, "h/acc_stderr": 0.1, "h/bits_per_byte": 1.2}
    assert [set(plot.keys.values()) for plot in plots_of([line])] == [{"acc", "acc_norm"}, {"bits_per_byte"}]


def test_few_points_are_a_table_with_a_row_for_each_step() -> None:
    assert few_points(table(METRICS, LOSS)).split("\n") == [
        "| step | training | validation |",
        "|---:|---:|---:|",
        "| 0 | – | 10.8 |",
        "| 400 | 4.6 | 4.7 |",
    ]
