"""The command line: presets under files under flags, and one clear line for what does not work."""

import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml

from fgpt_hf import FGPTConfig, FGPTForCausalLM
from fgpt_hf.config.options import described_fields
from fgpt_hf.config.parser import parse_run
from fgpt_hf.config.presets import INSTRUCT_PRESETS, PREFERENCE_PRESETS, PRESETS
from fgpt_hf.config.runs import BaseRun, InstructRun


def parse(*arguments: object) -> BaseRun:
    return parse_run(BaseRun, PRESETS, [str(argument) for argument in arguments])


def test_the_default_is_the_published_run() -> None:
    assert parse() == PRESETS["fgpt-712m"] == BaseRun()


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_taken_whole(name: str) -> None:
    assert parse("--preset", name) == PRESETS[name]


def test_a_file_changes_the_preset_and_flags_change_the_file(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("preset: quickstart\nlearning_rate: 1e-4\nmax_steps: 7\nbf16: false\n")
    run = parse("--config", config, "--max_steps", 9)
    changed = {"learning_rate": 1e-4, "max_steps": 9, "bf16": False}
    assert asdict(run) == asdict(PRESETS["quickstart"]) | changed


def test_a_recorded_run_is_a_config_file(tmp_path: Path) -> None:
    run = parse("--preset", "fgpt-124m", "--seed", 5, "--sample_prompt", 'It\'s: #1, "the" moon', "--fp16")
    (tmp_path / "run.yaml").write_text(run.to_yaml(), encoding="utf-8")
    assert parse("--config", tmp_path / "run.yaml") == replace(run, output_dir="runs/fgpt-124m")


def test_a_recorded_run_repeats_no_order_for_one_start(tmp_path: Path) -> None:
    """`--config run.yaml` would delete the run."""
    for flags in (["--overwrite_output_dir"], ["--resume_from_checkpoint", "latest"]):
        run = parse("--preset", "quickstart", *flags)
        (tmp_path / "run.yaml").write_text(run.to_yaml(), encoding="utf-8")
        again = parse("--config", tmp_path / "run.yaml")
        assert (again.overwrite_output_dir, again.resume_from_checkpoint) == (False, None)
    assert {field.name for field, option in described_fields(BaseRun) if option.one_time} == {
        "overwrite_output_dir",
        "print_groups",
        "profile",
        "resume_from_checkpoint",
    }


def test_a_flag_may_stand_alone_or_with_a_value() -> None:
    assert parse("--bf16").bf16 is True
    assert parse("--bf16", "false").bf16 is False
    assert parse().bf16 is None


OPTIONAL = {name for name, kind in get_type_hints(BaseRun).items() if type(None) in get_args(kind)}


@pytest.mark.parametrize("name", sorted(OPTIONAL - {"hub_model_id"}))  # which push_to_hub needs
def test_what_a_preset_or_a_file_sets_can_be_unset(name: str, tmp_path: Path) -> None:
    kind = next(kind for kind in get_args(get_type_hints(BaseRun)[name]) if kind is not type(None))
    preset = replace(BaseRun(), **{name: kind(8)})
    unset = replace(preset, **{name: None})
    (tmp_path / "run.yaml").write_text(f"{name}: {getattr(preset, name)}\n")
    for flags in ([f"--{name}=none"], ["--config", str(tmp_path / "run.yaml"), f"--{name}", "none"]):
        assert parse_run(BaseRun, {preset.preset: preset}, flags) == unset
    (tmp_path / "run.yaml").write_text(f"{name}: null\n")
    assert parse_run(BaseRun, {preset.preset: preset}, ["--config", str(tmp_path / "run.yaml")]) == unset


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["--preset", "fgpt-1b"], "unknown preset 'fgpt-1b': the presets are fgpt-712m, fgpt-355m"),
        (["--max_step", "3"], "unknown argument '--max_step': did you mean --max_steps?"),
        (["something"], "unknown argument 'something': --help lists all of them"),
        (["--max_steps", "ten"], "invalid int value: 'ten'"),
        (["--max_steps", "0"], "max_steps=0 must be above zero"),
        (["--per_device_train_batch_size", "-1"], "per_device_train_batch_size=-1 must be above zero"),
        (["--per_device_train_batch_size", "most"], "'most' is neither a number of rows nor auto"),
        (["--learning_rate", "nan"], "learning_rate=nan must be a finite number"),
        (["--learning_rate", "inf"], "learning_rate=inf must be a finite number"),
        (["--dropout", "1"], "dropout=1.0 must be zero or more and below 1"),
        (["--validation_fraction", "1"], "validation_fraction=1.0 must be zero or more and below 1"),
        (["--adam_beta2", "1.5"], "adam_beta2=1.5 must be above zero and below 1"),
        (["--min_lr_ratio", "2"], "min_lr_ratio=2.0 must be zero or more and at most 1"),
        (["--eval_steps", "0"], "eval_steps=0 must be above zero"),
        (["--lr_scheduler_type", "step"], "invalid choice: 'step' (choose from"),
        (["--bf16", "--fp16"], "bf16 and fp16 exclude each other"),
        (["--overwrite_output_dir", "--resume_from_checkpoint=latest"], "exclude each other: give one of them"),
        (["--config", "nowhere.yaml"], "--config nowhere.yaml: there is no such file"),
        (["--config", "."], "--config . is a folder: give a file, such as run.yaml"),
    ],
)
def test_bad_input_is_answered_with_what_would_work(arguments: list[str], answer: str) -> None:
    with pytest.raises(ValueError) as error:
        parse(*arguments)
    assert answer in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["[1, 2]", "max_steps: [", "max_stepz: 3", "max_steps:"])
def test_a_bad_file_is_answered_too(content: str, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(content)
    with pytest.raises(ValueError, match="bad.yaml|did you mean --max_steps"):
        parse("--config", tmp_path / "bad.yaml")


def test_the_command_line_ends_with_one_line_and_exit_code_2() -> None:
    program = "\n".join(
        [
            "from fgpt_hf.cli.entry_point import command_line",
            "from fgpt_hf.config.parser import parse_run",
            "from fgpt_hf.config.presets import PRESETS",
            "from fgpt_hf.config.runs import BaseRun",
            "command_line(lambda arguments: parse_run(BaseRun, PRESETS, arguments))",
        ]
    )
    done = subprocess.run([sys.executable, "-c", program, "--max_steps=0"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


def test_the_presets_have_the_parameters_that_their_names_say() -> None:
    import torch

    for name, millions in {"fgpt-712m": 712, "fgpt-355m": 355, "fgpt-124m": 124}.items():
        preset = PRESETS[name]
        shape: dict[str, Any] = {
            key: asdict(preset)[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")
        }
        with torch.device("meta"):
            model = FGPTForCausalLM(FGPTConfig(**shape))
        assert round(model.num_parameters() / 1e6) == millions


def test_a_preset_trains_the_tokens_that_its_comment_states() -> None:
    for name, parameters in {"fgpt-712m": 712e6, "fgpt-355m": 355e6, "fgpt-124m": 124e6}.items():
        run = PRESETS[name]
        tokens_per_step = (
            run.per_device_train_batch_size * run.gradient_accumulation_steps * run.max_position_embeddings
        )
        assert tokens_per_step == 2**19
        assert run.max_steps * tokens_per_step / parameters == pytest.approx(20, rel=0.05)


def test_the_preference_preset_warms_up_for_a_tenth_of_ultrafeedback() -> None:
    run = PREFERENCE_PRESETS["fgpt-712m"]
    pairs = 61_135 * (1 - run.validation_fraction)
    assert run.warmup_steps == pytest.approx(0.1 * pairs / run.rows_per_step(processes=1), rel=0.02)


def test_yaml_numbers_in_every_notation_are_numbers(tmp_path: Path) -> None:
    for text in ("3e-4", "0.0003", "3.0E-4"):
        (tmp_path / "run.yaml").write_text(f"learning_rate: {text}\n")
        assert parse("--config", tmp_path / "run.yaml").learning_rate == 3e-4
    assert yaml.safe_load("3e-4") == "3e-4"  # which is why values pass through the command line's own types


@pytest.mark.parametrize("flags", [["--per_device_train_batch_size", "auto"], ["--auto_find_batch_size"]])
def test_an_open_micro_batch_leaves_the_rows_of_a_step(flags: list[str]) -> None:
    changed = {"auto_find_batch_size": True, "gradient_accumulation_steps": 8}
    expected = asdict(PRESETS["fgpt-124m"]) | changed
    assert asdict(parse("--preset=fgpt-124m", "--gradient_accumulation_steps=8", *flags)) == expected


def test_an_open_micro_batch_is_recorded_and_a_later_number_closes_it(tmp_path: Path) -> None:
    run = parse("--per_device_train_batch_size=auto")
    (tmp_path / "run.yaml").write_text(run.to_yaml(), encoding="utf-8")
    assert parse("--config", tmp_path / "run.yaml") == replace(run, output_dir="runs/fgpt-712m")
    (tmp_path / "auto.yaml").write_text("per_device_train_batch_size: auto\n")
    assert parse("--config", tmp_path / "auto.yaml") == run
    closed = parse("--config", tmp_path / "auto.yaml", "--per_device_train_batch_size=4")
    assert (closed.per_device_train_batch_size, closed.auto_find_batch_size) == (4, False)


@pytest.mark.parametrize(
    ("flags", "tasks"),
    [
        ([], "basic-qa,capitals-unseen"),
        (["--dataset_name=basic-qa*2"], "basic-qa,capitals-unseen"),
        (["--dataset_name=novels"], None),
        (["--dataset_name=pydocs-chat,novels"], None),
        (["--dataset_name=novels", "--eval_tasks=pydocs-choice"], "pydocs-choice"),
        (["--dataset_name=novels", "--eval-tasks", "hellaswag"], "hellaswag"),
    ],
)
def test_a_presets_benchmarks_come_with_the_presets_data_only(flags: list[str], tasks: str | None) -> None:
    assert parse_run(InstructRun, INSTRUCT_PRESETS, ["--preset=quickstart", *flags]).eval_tasks == tasks


def test_fewer_rows_of_the_presets_data_keep_its_benchmarks() -> None:
    preset = InstructRun(preset="a", dataset_name="chats:12000", eval_tasks="capitals")
    assert parse_run(InstructRun, {"a": preset}, ["--preset=a", "--dataset_name=chats:50"]).eval_tasks == "capitals"


def test_the_later_one_of_a_files_time_and_given_steps_counts(tmp_path: Path) -> None:
    decided = replace(PRESETS["quickstart"], max_minutes=90.0, max_steps=77)
    (tmp_path / "run.yaml").write_text(decided.to_yaml())
    flags = [f"--config={tmp_path / 'run.yaml'}"]
    assert parse_run(BaseRun, PRESETS, flags).max_minutes == 90.0
    longer = parse_run(BaseRun, PRESETS, [*flags, "--max_steps=100"])
    assert (longer.max_steps, longer.max_minutes) == (100, None)
    assert parse_run(BaseRun, PRESETS, [*flags, "--max_minutes=2h"]).max_minutes == 120.0
