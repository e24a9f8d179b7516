"""The journey from a base model to one that answers, and what it survives."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fgpt_hf.cli import train_instruct
from fgpt_hf.config.parser import parse_run
from fgpt_hf.config.presets import INSTRUCT_PRESETS, PRESETS
from fgpt_hf.config.runs import InstructRun
from fgpt_hf.files import read_json_lines
from fgpt_hf.hub.front_matter import CARD
from fgpt_hf.hub.published_files import publishable
from tests.support.launched import Launched
from tests.support.tiny import random_model, save

pytestmark = pytest.mark.slow

TINY = [
    "--preset=rasbt",
    "--max_steps=6",
    "--per_device_train_batch_size=4",
    "--learning_rate=0.01",
    "--warmup_steps=2",
]
OFTEN = [
    "--eval_steps=3",
    "--sample_steps=6",
    "--save_steps=2",
    "--max_new_tokens=8",
    "--validation_prompts=2",
    "--bf16=false",
]
LORA = ["--use_peft", "--lora_r=4", "--lora_dropout=0.1"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model and entries to learn, three of which are none."""
    folder = tmp_path_factory.mktemp("instruct")
    torch.manual_seed(0)
    save(random_model(), folder / "base")
    entries = [{"instruction": f"Name {n}.", "input": "", "output": f"It is {n}."} for n in range(300)]
    for number in (7, 8, 9):
        entries[number]["output"] = ""
    (folder / "entries.json").write_text(json.dumps(entries))
    return folder


def launch(place: Path, name: str, *flags: str) -> Launched:
    source = [f"--model_name_or_path={place / 'base'}", f"--dataset_name={place / 'entries.json'}"]
    return Launched(place / name, *TINY, *OFTEN, *source, *flags, main=train_instruct.main).wait()


def train(place: Path, name: str, *flags: str) -> str:
    done = launch(place, name, *flags)
    assert done.exit_codes == [0], done.errors
    return done.output


def measured(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run without what depends on the clock."""
    kept = ("step", "tokens", "loss", "eval_loss", "answers_ended", "answer_tokens")
    return [{name: line[name] for name in kept if name in line} for line in read_json_lines(folder / "metrics.jsonl")]


@pytest.fixture(scope="module")
def trained(place: Path) -> tuple[Path, str]:
    return place / "run", train(place, "run")


def test_a_run_learns_to_answer_and_tells_what_it_left_out(trained: tuple[Path, str]) -> None:
    folder, output = trained
    losses = [line["eval_loss"] for line in read_json_lines(folder / "metrics.jsonl") if "eval_loss" in line]
    assert losses[-1] < losses[0] - 1
    assert "3 left out, 'output' is missing or empty: row 7 of" in output
    for expected in (
        "conversations in",
        "padding",
        "held out",
        "before training, and after 6 steps",
        "What is the capital",
    ):
        assert expected in output


def test_the_same_prompts_are_answered_before_and_after(trained: tuple[Path, str]) -> None:
    samples = read_json_lines(trained[0] / "samples.jsonl")
    asked = {step: [line["prompt"] for line in samples if line["step"] == step] for step in (0, 6)}
    assert asked[0] == asked[6] and len(samples) == 10
    assert asked[0][:3] == ["What is the capital of France?", "What is 2 + 2?", "Define 'cat'."]
    assert all(prompt.startswith("Name ") for prompt in asked[0][3:])
    assert samples[0].keys() == {"step", "prompt", "greedy", "sampled"}
    card = (trained[0] / "model" / CARD).read_text()
    assert all(f"| prompt | {decoding}, before | {decoding}, after |" in card for decoding in ("greedy", "sampled"))
    assert "conversational" in card and "`entries.json`" in card
    assert {"answer_length.png", "answers_ended.png"} <= {path.name for path in (trained[0] / "figures").iterdir()}


def test_the_model_chats_without_this_package_and_stops_at_the_end_of_its_turn(trained: tuple[Path, str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained[0] / "model")
    model = AutoModelForCausalLM.from_pretrained(trained[0] / "model")
    assert tokenizer.decode(model.generation_config.eos_token_id) == "<|endoftext|><|end|>"
    asked = [{"role": "user", "content": "Name 5."}]
    inputs = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=5).shape[1] > inputs["input_ids"].shape[1]


def resumed(place: Path, whole: Path, *flags: str) -> Path:
    """A copy of a run, begun again at its first checkpoint."""
    folder = place / f"{whole.name} resumed"
    shutil.copytree(whole, folder)
    train(place, folder.name, *flags, f"--resume_from_checkpoint={folder}/checkpoints/step_00000002")
    return folder


def assert_equal_runs(one: Path, other: Path) -> None:
    assert measured(one) == measured(other)
    weights, expected = (load_file(folder / "model" / "model.safetensors") for folder in (one, other))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)


def test_a_resumed_run_is_bit_equal_to_an_uninterrupted_one(place: Path, trained: tuple[Path, str]) -> None:
    assert_equal_runs(resumed(place, trained[0]), trained[0])


def test_adapters_learn_resume_exactly_and_leave_a_whole_model(place: Path) -> None:
    output = train(place, "adapted", *LORA)
    assert "parameters are trained, in adapters of rank 4" in output
    losses = [line["eval_loss"] for line in read_json_lines(place / "adapted" / "metrics.jsonl") if "eval_loss" in line]
    assert losses[-1] < losses[0]
    assert not hasattr(AutoModelForCausalLM.from_pretrained(place / "adapted" / "model"), "peft_config")
    assert_equal_runs(resumed(place, place / "adapted", *LORA), place / "adapted")


def test_an_adapter_alone_is_a_folder_to_publish(place: Path) -> None:
    train(place, "adapter", *LORA, "--max_steps=2", "--merge_adapter=false")
    names = publishable(place / "adapter" / "model").keys()
    assert {"adapter_model.safetensors", "adapter_config.json", CARD} <= names
    assert "library_name: peft" in (place / "adapter" / "model" / CARD).read_text()
    model = AutoModelForCausalLM.from_pretrained(place / "adapter" / "model")
    assert model.active_adapters() == ["default"]


def test_bad_input_is_one_line_and_leaves_nothing_behind(place: Path) -> None:
    answers = {
        f"--model_name_or_path={place}": "neither the folder nor its model/ holds config.json",
        "--bad_rows=refuse": "row 7 of",
        "--max_new_tokens=64": "max_new_tokens=64 leaves no room for a prompt",
    }
    for flag, answer in answers.items():
        done = launch(place, "bad", flag)
        assert done.exit_codes == [2], done.errors
        assert answer in done.errors.splitlines()[-1]
        assert "Traceback" not in done.errors
        assert not (place / "bad").exists()


@pytest.mark.parametrize(
    ("flag", "answer"),
    [
        ("--validation_fraction=1", "validation_fraction=1.0 must be zero or more and below 1"),
        ("--lora_rank=3", "unknown argument '--lora_rank=3': did you mean --lora_r?"),
        ("--long_rows=drop", "invalid choice: 'drop' (choose from"),
        ("--num_train_epochs=0", "num_train_epochs=0.0 must be above zero"),
        ("--preset=alpaca", "unknown preset 'alpaca': the presets are fgpt-712m, rasbt, quickstart"),
    ],
)
def test_a_flag_that_does_not_work_is_answered_with_one_that_does(flag: str, answer: str) -> None:
    with pytest.raises(ValueError) as error:
        parse_run(InstructRun, INSTRUCT_PRESETS, [flag])
    assert answer in str(error.value)


def test_an_instruct_run_does_not_write_where_the_base_run_of_its_preset_did() -> None:
    assert {run.folder for run in INSTRUCT_PRESETS.values()}.isdisjoint(run.folder for run in PRESETS.values())
