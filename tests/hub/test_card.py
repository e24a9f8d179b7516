"""The model card: what the run knows, nothing else, and what people wrote."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import EvalResult, ModelCard

from fgpt_hf.config.presets import PRESETS
from fgpt_hf.hub.card import CARD, build_card, card_of, front_matter, merge_card, write_card
from fgpt_hf.hub.card_results import result_files
from fgpt_hf.hub.card_sections import CardOptions, figure_files
from fgpt_hf.hub.run_record import RunRecord, read_facts
from tests.support.loopback_hub import card_errors
from tests.support.run_folders import METRICS, PROVENANCE, RESULTS, SAMPLES, write_run

TOLD = CardOptions(
    repo_id="tester/tiny", license="mit", language="en", space="tester/chat", dollars_per_hour=2.5, watts=700
)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "quickstart")


@pytest.fixture(scope="module")
def facts(run: Path) -> RunRecord:
    return read_facts(run / "model")


def test_the_card_parses_and_the_hub_would_take_it(facts: RunRecord) -> None:
    text = build_card(facts, TOLD)
    data = ModelCard(text).data
    assert card_errors("model", text) == []
    assert (data.license, data.language, data.library_name, data.pipeline_tag) == (
        *("mit", "en", "transformers", "text-generation"),
    )
    assert data.model_name == "tiny"


def test_its_results_equal_the_runs_files(facts: RunRecord) -> None:
    data = ModelCard(build_card(facts, TOLD)).data
    published = {(result.dataset_name, result.metric_type): result.metric_value for result in data.eval_results}
    scores = RESULTS["tasks"]["hellaswag"]
    assert published == {
        ("pydocs", "loss"): METRICS[-1]["eval_loss"],
        ("pydocs", "bits_per_byte"): METRICS[-1]["eval_bits_per_byte"],
        ("hellaswag", "acc"): scores["acc"],
        ("hellaswag", "acc_norm"): scores["acc_norm"],
    }
    assert data.metrics == ["loss", "bits_per_byte", "acc", "acc_norm"]
    (entry, _) = yaml.safe_load(result_files(facts)[".eval_results/hellaswag.yaml"])
    assert entry["dataset"] == {"id": "Rowan/hellaswag", "task_id": "hellaswag"}
    assert entry["value"] == scores["acc"]
    assert entry["notes"] == "acc; sum of log-likelihoods; standard error 0.0045"


def test_a_preference_run_has_results_of_pairs_and_no_perplexity(facts: RunRecord) -> None:
    last = {"step": 400, "eval_loss": 0.5, "eval_rewards/margins": 0.7, "eval_rewards/accuracies": 0.9}
    text = build_card(replace(facts, metrics=[last]), TOLD)
    published = {result.metric_type: result.metric_value for result in ModelCard(text).data.eval_results}
    assert published["preference_loss"] == 0.5 and published["reward_margin"] == 0.7
    assert published["reward_accuracy"] == 0.9 and "loss" not in published
    assert "held-out pairs" in text and "perplexity" not in text


@pytest.mark.parametrize(
    "known",
    [
        f"{PROVENANCE['data']['train']['documents']:,} | {PROVENANCE['data']['train']['tokens']:,}",
        "held-out 1.00%",
        "| steps | 400 |",
        "| tokens read | 819,200 |",
        "| hardware | 4 × NVIDIA H100 |",
        "| hours | 0.5 |",
        "| estimated cost | $5.00 |",
        "| estimated energy | 1.40 kWh |",
        f"| `learning_rate` | `{PRESETS['quickstart'].learning_rate}` |",
        "| hellaswag | acc | 0.2892 ± 0.0045 | sum of log-likelihoods |",
        "Measured with fgpt evaluate (fgpt-hf 0.1.0).",
        "![validation loss](figures/validation_loss.png)",
        "| commit | `0123456789abcdef` |",
        "https://huggingface.co/spaces/tester/chat",
        'from_pretrained("tester/tiny", trust_remote_code=True)',
        "howpublished = {https://huggingface.co/tester/tiny}",
    ],
)
def test_it_says_what_the_run_knows(facts: RunRecord, known: str) -> None:
    assert known in build_card(facts, TOLD)


def test_the_operations_are_counted_by_the_published_formula(facts: RunRecord) -> None:
    attention = 12 * 1 * 16 * 64  # layers, width, context
    assert facts.training_flops == 819_200 * (6 * facts.parameters + attention)
    assert facts.parameters == sum(p.numel() for p in load_parameters(facts))


def load_parameters(facts: RunRecord) -> list:
    from fgpt_hf import FGPTForCausalLM

    return list(FGPTForCausalLM.from_pretrained(facts.model).parameters())


def test_every_sample_of_the_last_step_is_shown_as_it_was_written(facts: RunRecord) -> None:
    card = build_card(facts, TOLD)
    for line in SAMPLES[1:]:
        for decoding in ("greedy", "sampled"):
            assert f"text\n{line['prompt']}⟶{line[decoding]}\n" in card
    assert "early" not in card
    assert "````text\nOnce⟶ ```fences```" in card


def test_what_is_not_known_is_left_out(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "model", tmp_path / "model")
    card = build_card(read_facts(tmp_path / "model"), CardOptions())
    headings = re.findall(r"^## (.*)", card, re.MULTILINE)
    assert headings == ["Quick start", "Limits and intended use"]
    data = ModelCard(card).data.to_dict()
    assert data.keys() == {"library_name", "pipeline_tag", "tags"}
    for word in ("None", "unknown", "{}", "[]", "nan"):
        assert word not in card


def test_no_folder_of_the_machine_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_text("")
    run = write_run(tmp_path / "run", dataset_name=tmp_path / "own.jsonl", model_name_or_path=tmp_path / "base")
    card = build_card(read_facts(run / "model"), TOLD)
    assert str(tmp_path) not in card and "`own.jsonl`" in card
    assert "base_model" not in card and "datasets" not in yaml.safe_load(card.split("---")[1])


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("pydocs-validation=/home/me/secret/x.txt", "pydocs-validation=x.txt"),
        ("a.jsonl,/home/me/private/b.jsonl:200,~/c.jsonl*2", "a.jsonl,b.jsonl:200,c.jsonl*2"),
        (r"C:\Users\me\rows", "rows"),
        ("/home/me/rows/", "rows/"),
        ("runs/base/model", "model"),
        ("tester/base", "tester/base"),
    ],
)
def test_folders_go_from_every_part_of_a_value(facts: RunRecord, value: str, shown: str) -> None:
    assert replace(facts, provenance={"local": ["runs/base/model"]}).without_folders(value) == shown


def test_what_lay_on_the_machine_that_trained_is_not_looked_for_on_the_hub(facts: RunRecord) -> None:
    names = {"model_name_or_path": "runs/base", "dataset_name": "mine/rows,somebody/pairs"}
    card = build_card(replace(facts, run=facts.run | names, provenance={"local": ["runs/base", "mine/rows"]}), TOLD)
    found = yaml.safe_load(card.split("---")[1])
    assert "base_model" not in found and found["datasets"] == ["somebody/pairs"]
    assert "runs/base" not in card and "mine/rows" not in card


def test_a_benchmark_from_a_file_is_named_without_its_folder(facts: RunRecord) -> None:
    results = {"tasks": {"pydocs-validation=/home/me/x.txt": {"bits_per_byte": 1.0}}}
    card = build_card(replace(facts, results=results), TOLD)
    assert "| pydocs-validation=x.txt | bits_per_byte |" in card and "/home/me" not in card


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"dataset_name": "fineweb-edu"}, {"datasets": ["HuggingFaceFW/fineweb-edu"]}),
        ({"dataset_name": "somebody/poems"}, {"datasets": ["somebody/poems"]}),
        ({"dataset_name": "pydocs"}, {}),
        ({"dataset_name": "../rows"}, {}),
        (
            {"dataset_name": "pydocs-preference:200,somebody/pairs", "model_name_or_path": "tester/base"},
            {"datasets": ["somebody/pairs"], "base_model": "tester/base"},
        ),
        ({"model_name_or_path": "tester/base"}, {"base_model": "tester/base"}),
        ({"model_name_or_path": "/home/me/base"}, {}),
        ({"model_name_or_path": "../base"}, {}),
    ],
)
def test_data_sets_and_base_models_are_named_if_the_hub_has_them(
    facts: RunRecord, fields: dict, expected: dict
) -> None:
    found = front_matter(replace(facts, run=facts.run | fields), CardOptions())
    assert {name: found[name] for name in ("datasets", "base_model") if name in found} == expected


def test_rows_that_were_prepared_before_are_named_by_their_text(facts: RunRecord) -> None:
    source = {"dataset_name": "fineweb-edu", "dataset_config_name": None, "validation_fraction": 0.002}
    prepared = replace(facts, run=facts.run | {"dataset_name": "/data/rows"}, provenance={"source": source})
    card = build_card(prepared, TOLD)
    assert "[HuggingFaceFW/fineweb-edu](https://huggingface.co/datasets/HuggingFaceFW/fineweb-edu)" in card
    assert "configuration `sample-10BT`" in card and "held-out 0.20%" in card and "/data/rows" not in card


def test_a_chat_model_is_shown_chatting_and_a_stock_one_without_remote_code(facts: RunRecord) -> None:
    chat = replace(facts, run=facts.run | {"model_name_or_path": "tester/base"})
    assert '"role": "user"' in build_card(chat, TOLD)
    assert "conversational" in front_matter(chat, TOLD)["tags"]
    assert "trained from [tester/base]" in build_card(chat, TOLD)
    assert "trust_remote_code" not in build_card(facts, replace(TOLD, stock=True))


def test_a_checkpoints_card_knows_nothing_of_later_steps(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    checkpoint = shutil.copytree(run / "model", tmp_path / "run" / "checkpoints" / "step_00000200")
    early = read_facts(checkpoint)
    assert (early.last["step"], early.last["eval_loss"], early.results) == (0, METRICS[0]["eval_loss"], {})
    assert early.last_samples == SAMPLES[:1]


def test_figures_come_from_the_run(facts: RunRecord) -> None:
    assert list(figure_files(facts)) == ["figures/validation_loss.png"]


# What people wrote


def edited(card: str, before: str = "", after: str = "") -> str:
    front, body = card.split("---\n\n", 1)
    return f"{front}---\n\n{before}\n\n{body}\n{after}\n"


def outside(card: str) -> list[str]:
    text = re.sub(r"<!-- fgpt: written.*?<!-- fgpt: end -->", "|", card.split("---\n", 2)[2], flags=re.DOTALL)
    return [part.strip() for part in text.split("|")]


def test_edits_outside_the_marks_survive_and_edits_inside_do_not(facts: RunRecord) -> None:
    old = edited(build_card(facts, TOLD), "# My own title", "Thanks to my cat.").replace("Quick start", "Slow start")
    new = merge_card(build_card(facts, TOLD), old)
    assert outside(new) == ["# My own title", "Thanks to my cat."]
    assert "## Quick start" in new and "Slow start" not in new
    assert merge_card(build_card(facts, TOLD), new) == new


def test_a_card_without_marks_is_all_a_persons(facts: RunRecord) -> None:
    new = merge_card(build_card(facts, TOLD), "---\nlicense: apache-2.0\n---\n# By hand\n")
    assert outside(new) == ["# By hand", ""]


def test_fields_that_only_a_person_wrote_stay_and_lists_are_joined(facts: RunRecord) -> None:
    old = "---\nlicense: apache-2.0\ntags: [poetry]\nlibrary_name: other\nthumbnail: cat.png\n---\n"
    fields = yaml.safe_load(merge_card(build_card(facts, CardOptions()), old).split("---\n")[1])
    assert (fields["license"], fields["thumbnail"], fields["library_name"]) == ("apache-2.0", "cat.png", "transformers")
    assert fields["tags"] == ["fgpt", "gpt2", "poetry"]


def test_of_two_texts_the_one_stands_that_was_edited_since_the_last_publish(facts: RunRecord) -> None:
    fresh = build_card(facts, TOLD)
    published = merge_card(edited(fresh, "first"), fresh)
    here, there = merge_card(fresh, edited(fresh, "mine")), published.replace("first", "theirs")
    assert outside(merge_card(fresh, there))[0] == "theirs"  # not edited here
    assert outside(merge_card(here, published))[0] == "mine"  # not edited there
    assert outside(merge_card(published, there))[0] == "theirs"  # here is what was published
    with pytest.raises(ValueError, match="README.md was edited here and on the Hub, in different ways"):
        merge_card(here, there)


def test_results_that_an_evaluation_wrote_into_the_card_stay_and_are_shown(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    model = tmp_path / "run" / "model"
    card = ModelCard.load(write_card(model))
    task = {"task_type": "text-generation", "dataset_type": "EleutherAI/lambada_openai", "dataset_name": "lambada"}
    card.data.eval_results += [EvalResult(**task, metric_type="acc", metric_value=0.25, metric_name="acc: greedy")]
    card.save(model / CARD)
    local = write_card(model).read_text()
    assert "| lambada | acc | 0.2500 | acc: greedy |" in local
    shutil.copytree(run, tmp_path / "again")  # another folder, which knows only what is published
    for text in (local, merge_card(card_of(read_facts(tmp_path / "again" / "model"), TOLD), local)):
        results = [(result.dataset_name, result.metric_value) for result in ModelCard(text).data.eval_results]
        assert len(results) == 5 and ("lambada", 0.25) in results


def test_a_folders_card_is_written_in_place(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    model = tmp_path / "run" / "model"
    card = write_card(model)
    card.write_text(edited(card.read_text(), "# Mine"))
    assert outside(write_card(model).read_text())[0] == "# Mine"
    assert outside(card_of(read_facts(model), TOLD))[0] == "# Mine"


# Bad input


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("results.json", "{", "results.json is damaged"),
        ("model/config.json", "[", "config.json is damaged"),
        ("model/model.safetensors", "", "holds no weights that can be read"),
        (f"model/{CARD}", "---\na: [\n---\n", "the front matter of the model card cannot be read"),
    ],
)
def test_damaged_files_are_named(run: Path, tmp_path: Path, name: str, content: str, problem: str) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / name).write_text(content)
    with pytest.raises(ValueError, match=problem):
        write_card(tmp_path / "run" / "model")


def test_results_may_hold_nothing_but_tasks(facts: RunRecord) -> None:
    bare = replace(facts, results=json.loads('{"tasks": {"hellaswag": {"acc": 0.3}}}'))
    assert "| hellaswag | acc | 0.3000 |" in build_card(bare, CardOptions())
    assert result_files(bare) == {}
