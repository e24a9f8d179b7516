"""The model card: what the run recorded, nothing else, and what people wrote."""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import EvalResult, ModelCard

from fgpt_hf import FGPTForCausalLM
from fgpt_hf.config.presets import INSTRUCT_PRESETS, PREFERENCE_PRESETS, PRESETS
from fgpt_hf.config.runs import InstructRun, Run
from fgpt_hf.config.tuning_options import PreferenceLoss
from fgpt_hf.data.splits import SplitSize
from fgpt_hf.errors import UserError
from fgpt_hf.evaluation.results import ResultsRecord, TaskDataset
from fgpt_hf.hub.card import build_card, card_data, figure_files, update_card, write_card
from fgpt_hf.hub.card_merge import merge_card
from fgpt_hf.hub.card_options import CardOptions
from fgpt_hf.hub.card_results import result_files
from fgpt_hf.hub.front_matter import CARD
from fgpt_hf.hub.run_record import RunRecord, Sample, read_run_record
from fgpt_hf.hub.stage_record import StageRecord
from fgpt_hf.training.provenance import Provenance
from tests.support.loopback_hub import card_errors
from tests.support.run_folders import METRICS, PROVENANCE, RESULTS, SAMPLES, write_run

OPTIONS = CardOptions(
    repo_id="tester/tiny", license="mit", language="en", space="tester/chat", dollars_per_hour=2.5, watts=700
)
BASE, INSTRUCT, PREFERENCE = PRESETS["quickstart"], INSTRUCT_PRESETS["quickstart"], PREFERENCE_PRESETS["quickstart"]
HOSTILE = "x\n# Owned\n<script>alert(1)</script> | [a](b) `c` ``` <!-- fgpt: end -->"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "quickstart")


@pytest.fixture(scope="module")
def record(run: Path) -> RunRecord:
    return read_run_record(run / "model")


def with_run(
    record: RunRecord, run: Run, provenance: Provenance | None = None, before: StageRecord | None = None
) -> RunRecord:
    """The record of the same model, trained by another run."""
    return replace(record, stage=StageRecord(run, provenance or Provenance(), before=before))


def front_matter(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---")[1])


def snippet(card: str) -> str:
    (found,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    return found


def test_the_card_parses_and_the_hub_would_take_it(record: RunRecord) -> None:
    text = build_card(record, OPTIONS)
    data = ModelCard(text).data
    assert card_errors("model", text) == []
    assert (data.license, data.language, data.library_name, data.pipeline_tag) == (  # type: ignore[attr-defined]
        *("mit", "en", "transformers", "text-generation"),
    )
    assert data.model_name == "tiny"  # type: ignore[attr-defined]


def test_its_results_equal_the_runs_files(record: RunRecord) -> None:
    data = ModelCard(build_card(record, OPTIONS)).data
    published = {(result.dataset_name, result.metric_type): result.metric_value for result in data.eval_results}  # type: ignore[attr-defined]
    scores = RESULTS["tasks"]["hellaswag"]
    assert published == {
        ("pydocs", "loss"): METRICS[-1]["eval_loss"],
        ("pydocs", "bits_per_byte"): METRICS[-1]["eval_bits_per_byte"],
        ("hellaswag", "acc"): scores["acc"],
        ("hellaswag", "acc_norm"): scores["acc_norm"],
    }
    assert data.metrics == ["loss", "bits_per_byte", "acc", "acc_norm"]  # type: ignore[attr-defined]
    (entry, _) = yaml.safe_load(result_files(record)[".eval_results/hellaswag.yaml"])
    assert entry["dataset"] == {"id": "Rowan/hellaswag", "task_id": "hellaswag"}
    assert entry["value"] == scores["acc"]
    assert entry["notes"] == "acc; sum of log-likelihoods; standard error 0.0045"


def test_a_preference_run_has_results_of_pairs_and_no_perplexity(record: RunRecord) -> None:
    last = {"step": 400, "eval_loss": 0.5, "eval_rewards/margins": 0.7, "eval_rewards/accuracies": 0.9}
    text = build_card(replace(record, metrics=[last]), OPTIONS)
    published = {result.metric_type: result.metric_value for result in ModelCard(text).data.eval_results}  # type: ignore[attr-defined]
    assert published["preference_loss"] == 0.5 and published["reward_margin"] == 0.7
    assert published["reward_accuracy"] == 0.9 and "loss" not in published
    assert "validation pairs" in text and "perplexity" not in text


@pytest.mark.parametrize(
    "known",
    [
        f"| train | {PROVENANCE['data']['train']['documents']:,} documents "
        f"| {PROVENANCE['data']['train']['tokens']:,} |",
        "(1.00%)",
        "| steps | 400 |",
        "| tokens processed | 819,200 |",
        f"| batch size | {BASE.rows_per_step(4)} sequences of 256 tokens |",
        "| hardware | 4 × NVIDIA H100 |",
        "| hours | 0.5 |",
        "| floating-point operations | 1.50e+15 |",
        "| estimated cost | 5.00 USD |",
        "| estimated energy | 1.40 kWh |",
        f"| peak learning rate | {BASE.learning_rate} |",
        "| `streaming` | `False` |",
        "| `hellaswag` | `acc` | 0.2892 ± 0.0045 | sum of log-likelihoods |",
        "measured with fgpt evaluate (fgpt-hf 0.1.0).",
        "![validation loss](figures/validation_loss.png)",
        "- commit `0123456789abcdef`",
        "- network's code, sha256 `fedcba9876543210`",
        "https://huggingface.co/spaces/tester/chat",
        'model_id = "tester/tiny"',
        "from_pretrained(model_id, trust_remote_code=True)",
        "howpublished = {https://huggingface.co/tester/tiny}",
    ],
)
def test_it_says_what_the_run_knows(record: RunRecord, known: str) -> None:
    assert known in build_card(record, OPTIONS)


def test_the_operations_are_those_that_the_run_recorded(record: RunRecord) -> None:
    assert record.stage is not None
    assert record.stage.provenance.training_flops == PROVENANCE["training_flops"]


def test_each_parameter_is_counted_once(record: RunRecord) -> None:
    model = FGPTForCausalLM.from_pretrained(record.model)
    assert record.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_every_sample_of_the_last_step_is_shown_unchanged(record: RunRecord) -> None:
    card = build_card(record, OPTIONS)
    for line in SAMPLES[1:]:
        for decoding in ("greedy", "sampled"):
            assert f"text\n{line['prompt']}⟶{line[decoding]}\n" in card
    assert "early" not in card
    assert "````text\nOnce⟶ ```fences```" in card


def test_what_is_not_known_is_left_out(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "model", tmp_path / "model")
    card = build_card(read_run_record(tmp_path / "model"), CardOptions())
    headings = re.findall(r"^## (.*)", card, re.MULTILINE)
    assert headings == ["How to use", "Architecture", "Intended use and limitations"]
    data = ModelCard(card).data.to_dict()
    assert data.keys() == {"library_name", "pipeline_tag", "tags"}
    for word in ("None", "unknown", "{}", "[]", "nan", "\n\n\n"):
        assert word not in card


def test_options_that_were_not_used_are_left_out(record: RunRecord) -> None:
    card = build_card(with_run(record, PREFERENCE), OPTIONS)
    assert "lora" not in card.lower() and "fsdp" not in card and "margin 0.5" not in card
    lora = replace(PREFERENCE, use_peft=True, lora_r=4, loss_type="simpo", simpo_gamma=0.25)
    card = build_card(with_run(record, lora), OPTIONS)
    assert "| LoRA | rank 4, alpha 32, on all-linear; merged into the weights |" in card
    assert "| loss | SimPO, beta 0.1, margin 0.25 |" in card


@pytest.mark.parametrize(("loss_type", "method"), [("sigmoid", "DPO"), ("ipo", "IPO"), ("simpo", "SimPO")])
def test_a_preferred_model_names_its_method_and_the_stages_before_it(
    record: RunRecord, loss_type: PreferenceLoss, method: str
) -> None:
    sizes = Provenance(splits={"train": SplitSize(7, 1234)})
    base = StageRecord(replace(BASE, dataset_name="fineweb-edu"), sizes)
    instruct = StageRecord(replace(INSTRUCT, dataset_name="smol-smoltalk"), sizes, before=base)
    card = build_card(with_run(record, replace(PREFERENCE, loss_type=loss_type), sizes, instruct), OPTIONS)
    assert f"({method}) taught it to prefer the better of two replies" in card
    assert ", after base training and instruction tuning." in card
    stages = [row.strip("| ").split(" | ") for row in card.splitlines() if "| train |" in row]
    assert [(name, examples) for name, _, _, examples, _ in stages] == [
        ("base training", "7 documents"),
        ("instruction tuning", "7 conversations"),
        (f"preference optimization ({method})", "7 pairs"),
    ]
    assert front_matter(card)["datasets"] == ["HuggingFaceFW/fineweb-edu", "HuggingFaceTB/smol-smoltalk"]
    assert method.lower() in front_matter(card)["tags"]


def test_a_chat_model_is_used_by_its_template_and_a_base_model_by_a_text(
    record: RunRecord, capsys: pytest.CaptureFixture[str]
) -> None:
    base = snippet(build_card(record, CardOptions()))
    chat = snippet(build_card(with_run(record, INSTRUCT), CardOptions()))
    assert "apply_chat_template" in chat and "Once upon a time" not in chat
    assert "apply_chat_template" not in base and "Once upon a time" in base
    for code in (base, chat):
        exec(code.replace("path/to/this/folder", str(record.model)).replace("=60", "=3"), {})
        assert capsys.readouterr().out


def test_no_value_of_a_run_can_break_the_page(record: RunRecord) -> None:
    names = {"preset": HOSTILE, "dataset_name": HOSTILE.replace("*", ""), "model_name_or_path": HOSTILE}
    provenance = Provenance(
        splits={HOSTILE: SplitSize(1, 2)},
        device=HOSTILE,
        processes=1,
        precision=HOSTILE,
        versions={HOSTILE: HOSTILE},
        commit=HOSTILE,
        network_code_sha256=HOSTILE,
    )
    run = replace(INSTRUCT, **names, use_peft=True, lora_target_modules=HOSTILE, dataset_train_split=HOSTILE)
    results = ResultsRecord(
        tasks={HOSTILE: {HOSTILE: 1.0}},
        conventions={HOSTILE: HOSTILE},
        versions={HOSTILE: HOSTILE},
        harness=HOSTILE,
    )
    hostile = replace(
        with_run(record, run, provenance, StageRecord(replace(BASE, dataset_name=HOSTILE))),
        results=results,
        samples=[Sample(1, HOSTILE, {"greedy": HOSTILE})],
    )
    options = CardOptions(license=HOSTILE, base_model=HOSTILE, space=HOSTILE)
    for each in (hostile, replace(hostile, stage=StageRecord(BASE, provenance))):
        card = build_card(each, options)
        body = card.split("\n---\n", 1)[1]
        page = re.sub(r"^(`{3,})\w+\n.*?^\1$", "", body, flags=re.DOTALL | re.MULTILINE)
        assert not re.search("^# (?!quickstart|x)", page, re.MULTILINE)
        assert "<script" not in page and page.count("<!--") == 2
        for rows in re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE):
            assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows.splitlines()}) == 1
        merged = merge_card(card, f"{card}after\n")
        assert merged.endswith("<!-- fgpt: end -->\n\nafter\n") and body.partition("-->")[2].strip() in merged


def test_no_folder_of_the_machine_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_text("")
    names = {"dataset_name": str(tmp_path / "own.jsonl"), "model_name_or_path": str(tmp_path / "base")}
    card = build_card(read_run_record(write_run(tmp_path / "run", **names) / "model"), OPTIONS)
    assert str(tmp_path) not in card and "`own.jsonl`" in card
    assert "base_model" not in front_matter(card) and "datasets" not in front_matter(card)


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
def test_folders_go_from_every_part_of_a_value(value: str, shown: str) -> None:
    assert StageRecord(BASE, Provenance(local=["runs/base/model"])).without_folders(value) == shown


def test_what_lay_on_the_machine_that_trained_is_not_looked_for_on_the_hub(record: RunRecord) -> None:
    run = replace(INSTRUCT, model_name_or_path="runs/base", dataset_name="mine/rows,somebody/pairs")
    card = build_card(with_run(record, run, Provenance(local=["runs/base", "mine/rows"])), OPTIONS)
    found = front_matter(card)
    assert "base_model" not in found and found["datasets"] == ["somebody/pairs"]
    assert "runs/base" not in card and "mine/rows" not in card


def test_a_benchmark_from_a_file_is_named_without_its_folder(record: RunRecord) -> None:
    results = ResultsRecord(tasks={"pydocs-validation=/home/me/x.txt": {"bits_per_byte": 1.0}})
    card = build_card(replace(record, results=results), OPTIONS)
    assert "| `pydocs-validation=x.txt` | `bits_per_byte` |" in card and "/home/me" not in card


@pytest.mark.parametrize(
    ("kind", "fields", "expected"),
    [
        (BASE, {"dataset_name": "fineweb-edu"}, {"datasets": ["HuggingFaceFW/fineweb-edu"]}),
        (BASE, {"dataset_name": "somebody/poems"}, {"datasets": ["somebody/poems"]}),
        (BASE, {"dataset_name": "pydocs"}, {}),
        (BASE, {"dataset_name": "../rows"}, {}),
        (
            PREFERENCE,
            {"dataset_name": "pydocs-preference:200,somebody/pairs", "model_name_or_path": "tester/base"},
            {"datasets": ["somebody/pairs"], "base_model": "tester/base"},
        ),
        (INSTRUCT, {"model_name_or_path": "tester/base"}, {"base_model": "tester/base"}),
        (INSTRUCT, {"model_name_or_path": "/home/me/base"}, {}),
        (INSTRUCT, {"model_name_or_path": "../base"}, {}),
    ],
)
def test_data_sets_and_base_models_are_named_if_the_hub_has_them(
    record: RunRecord, kind: Run, fields: Mapping[str, Any], expected: Mapping[str, Any]
) -> None:
    provenance = Provenance(local=["runs/quickstart/base"])
    found = card_data(with_run(record, replace(kind, **fields), provenance), CardOptions()).to_dict()
    assert {name: found[name] for name in ("datasets", "base_model") if name in found} == expected


def test_a_data_set_behind_an_address_is_linked(record: RunRecord) -> None:
    card = build_card(with_run(record, replace(INSTRUCT, dataset_name="rasbt-instruct")), OPTIONS)
    assert "[rasbt-instruct](https://raw.githubusercontent.com/rasbt/" in card


def test_rows_that_were_prepared_before_are_named_by_their_text(record: RunRecord) -> None:
    source = {"dataset_name": "fineweb-edu", "dataset_config_name": None, "validation_fraction": 0.002}
    provenance = Provenance(source=source, splits={"train": SplitSize(1, 2)})
    card = build_card(with_run(record, replace(BASE, dataset_name="/data/rows"), provenance), OPTIONS)
    assert "[HuggingFaceFW/fineweb-edu](https://huggingface.co/datasets/HuggingFaceFW/fineweb-edu)" in card
    assert "configuration sample-10BT" in card and "(0.20%)" in card and "/data/rows" not in card


def test_a_validation_set_of_its_own_is_named_without_its_folder(record: RunRecord) -> None:
    provenance = Provenance(local=["/home/me/held.jsonl"], splits={"train": SplitSize(1, 2)})
    run = replace(BASE, dataset_name="fineweb-edu", validation_dataset="/home/me/held.jsonl")
    card = build_card(with_run(record, run, provenance), OPTIONS)
    assert "The validation split is `held.jsonl`, whose documents were not trained on." in card
    assert "/home/me" not in card and "A hash of each" not in card


def test_a_chat_model_names_its_base_and_a_stock_one_needs_no_remote_code(record: RunRecord) -> None:
    chat = with_run(record, replace(INSTRUCT, model_name_or_path="tester/base"))
    assert "conversational" in card_data(chat, OPTIONS).to_dict()["tags"]
    assert "trained from [tester/base](https://huggingface.co/tester/base)" in build_card(chat, OPTIONS)
    assert "trust_remote_code" not in build_card(record, replace(OPTIONS, architecture="gpt2"))


def test_a_checkpoints_card_knows_nothing_of_later_steps(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    checkpoint = shutil.copytree(run / "model", tmp_path / "run" / "checkpoints" / "step_00000200")
    early = read_run_record(checkpoint)
    assert (early.last["step"], early.last["eval_loss"]) == (0, METRICS[0]["eval_loss"])
    assert not early.results.tasks
    assert [sample.outputs["greedy"] for sample in early.last_samples] == [" early"]


def test_the_run_before_is_read_back_with_the_one_that_started_from_it(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", model_name_or_path=str(tmp_path / "base"))
    before = {"run": asdict(BASE), "provenance": PROVENANCE, "last": METRICS[-1]}
    (run / "provenance.json").write_text(json.dumps(PROVENANCE | {"started_from": before}))
    base, instruct = read_run_record(run / "model").stages
    assert base.run == BASE and isinstance(instruct.run, InstructRun)
    assert (base.tokens, base.provenance.splits["train"].documents) == (819_200, 75_000)


def test_figures_come_from_the_run(record: RunRecord) -> None:
    assert list(figure_files(record)) == ["figures/validation_loss.png"]


# What people wrote


def edited(card: str, before: str = "", after: str = "") -> str:
    front, body = card.split("---\n\n", 1)
    return f"{front}---\n\n{before}\n\n{body}\n{after}\n"


def outside(card: str) -> list[str]:
    text = re.sub(r"<!-- fgpt: written.*?<!-- fgpt: end -->", "|", card.split("---\n", 2)[2], flags=re.DOTALL)
    return [part.strip() for part in text.split("|")]


def test_edits_outside_the_marks_survive_and_edits_inside_do_not(record: RunRecord) -> None:
    old = edited(build_card(record, OPTIONS), "# My own title", "Thanks to my cat.").replace("How to use", "Slow start")
    new = merge_card(build_card(record, OPTIONS), old)
    assert outside(new) == ["# My own title", "Thanks to my cat."]
    assert "## How to use" in new and "Slow start" not in new
    assert merge_card(build_card(record, OPTIONS), new) == new


def test_a_card_without_marks_is_all_a_persons(record: RunRecord) -> None:
    new = merge_card(build_card(record, OPTIONS), "---\nlicense: apache-2.0\n---\n# By hand\n")
    assert outside(new) == ["# By hand", ""]


def test_fields_that_only_a_person_wrote_stay_and_lists_are_joined(record: RunRecord) -> None:
    old = "---\nlicense: apache-2.0\ntags: [poetry]\nlibrary_name: other\nthumbnail: cat.png\n---\n"
    fields = yaml.safe_load(merge_card(build_card(record, CardOptions()), old).split("---\n")[1])
    assert (fields["license"], fields["thumbnail"], fields["library_name"]) == ("apache-2.0", "cat.png", "transformers")
    assert fields["tags"] == ["fgpt", "gpt2", "poetry"]


def test_of_two_texts_the_one_stands_that_was_edited_since_the_last_publish(record: RunRecord) -> None:
    fresh = build_card(record, OPTIONS)
    published = merge_card(edited(fresh, "first"), fresh)
    here, there = merge_card(fresh, edited(fresh, "mine")), published.replace("first", "theirs")
    assert outside(merge_card(fresh, there))[0] == "theirs"  # not edited here
    assert outside(merge_card(here, published))[0] == "mine"  # not edited there
    assert outside(merge_card(published, there))[0] == "theirs"  # here is what was published
    with pytest.raises(UserError, match="README.md was edited here and on the Hub, in different ways"):
        merge_card(here, there)


def test_results_that_an_evaluation_wrote_into_the_card_stay_and_are_shown(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    model = tmp_path / "run" / "model"
    card = ModelCard.load(write_card(model))
    task = {"task_type": "text-generation", "dataset_type": "EleutherAI/lambada_openai", "dataset_name": "lambada"}
    card.data.eval_results += [EvalResult(**task, metric_type="acc", metric_value=0.25, metric_name="acc: greedy")]
    card.save(model / CARD)
    local = write_card(model).read_text()
    assert "| lambada | `acc` | 0.2500 | acc: greedy |" in local
    shutil.copytree(run, tmp_path / "again")  # another folder, which knows only what is published
    for text in (local, merge_card(update_card(read_run_record(tmp_path / "again" / "model"), OPTIONS), local)):
        results = [(result.dataset_name, result.metric_value) for result in ModelCard(text).data.eval_results]  # type: ignore[attr-defined]
        assert len(results) == 5 and ("lambada", 0.25) in results


def test_a_folders_card_is_written_in_place(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    model = tmp_path / "run" / "model"
    card = write_card(model)
    card.write_text(edited(card.read_text(), "# Mine"))
    assert outside(write_card(model).read_text())[0] == "# Mine"
    assert outside(update_card(read_run_record(model), OPTIONS))[0] == "# Mine"


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
    with pytest.raises(UserError, match=problem):
        write_card(tmp_path / "run" / "model")


def test_results_cannot_name_files_outside_their_folder_or_tasks_without_results(record: RunRecord) -> None:
    dataset = TaskDataset(id="a/b", task_id="t", split="test")
    tasks, datasets = {"../../x": {"acc": 0.3}}, {"../../x": dataset, "unmeasured": dataset}
    files = result_files(replace(record, results=ResultsRecord(tasks=tasks, datasets=datasets)))
    assert list(files) == [".eval_results/------x.yaml"]


def test_a_loss_that_no_model_has_breaks_no_card(record: RunRecord) -> None:
    card = build_card(replace(record, metrics=[{**METRICS[-1], "eval_loss": 1e30}]), OPTIONS)
    assert "perplexity" not in card


def test_results_may_hold_nothing_but_tasks(record: RunRecord) -> None:
    bare = replace(record, results=ResultsRecord(tasks={"hellaswag": {"acc": 0.3}}))
    assert "| `hellaswag` | `acc` | 0.3000 |" in build_card(bare, CardOptions())
    assert result_files(bare) == {}
