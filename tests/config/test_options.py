"""Options say all of themselves in one place: their help, their limits and what a resumed run may change."""

from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest

from fgpt_hf.config.options import Limits, described_fields
from fgpt_hf.config.parser import parse_options, parse_run
from fgpt_hf.config.presets import INSTRUCT_PRESETS, PREFERENCE_PRESETS, PRESETS
from fgpt_hf.config.runs import BaseRun, InstructRun, PreferenceRun, Preparation
from fgpt_hf.errors import UserError

KINDS: list[Any] = [BaseRun, InstructRun, PreferenceRun, Preparation]


def help_of(kind: Any, presets: Any, capsys: pytest.CaptureFixture[str]) -> str:
    """Return the text of `--help` in one line."""
    with pytest.raises(SystemExit):
        parse_run(kind, presets, ["--help"])
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("kind", KINDS)
def test_every_option_is_a_whole_sentence_and_leaves_the_default_to_the_parser(kind: Any) -> None:
    described = dict(described_fields(kind))
    assert [field.name for field in described] == [field.name for field in fields(kind)]
    for field, option in described.items():
        assert option.help[0].isupper() and option.help[-1] == ".", field.name
        assert "default" not in option.help, field.name


def test_the_help_shows_the_groups_in_the_order_in_which_one_decides(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(PreferenceRun, PREFERENCE_PRESETS, capsys)
    groups = ["Run", "Start", "Dataset", "Optimization", "Hardware", "Evaluation", "Checkpoint", "Hub", "LoRA"]
    places = [text.index(f"{group} options: ") for group in (*groups, "Preference loss")]
    assert places == sorted(places)
    assert "Dataset options: Which rows are read, which of them are held out" in text
    assert text.count("--max_steps") == 1 and "--max-steps" not in text


def test_the_help_begins_with_the_options_that_only_this_command_has(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_options(Preparation, ["--help"])
    text = capsys.readouterr().out
    assert text.index("\nPreparation:") < text.index("\nDocuments:") < text.index("\nText source:")


def test_the_help_states_the_presets_defaults_in_words_where_there_is_no_value(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = help_of(BaseRun, {"fgpt-712m": PRESETS["quickstart"]}, capsys)
    assert "Number of optimizer steps of the whole run. (default: 160)" in text
    assert "Compute in bfloat16. (default: where the hardware supports it)" in text
    assert "(default: None)" not in text and "(default: False)" not in text


def test_the_help_shows_what_kind_of_value_an_option_takes(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(BaseRun, PRESETS, capsys)
    kinds = ("--seed N ", "--learning_rate X ", "--fsdp [true|false] ", "--max_minutes TIME|none ", "--config FILE ")
    for shown in kinds:
        assert shown in text
    assert "--sampled_softmax N|none " in text and "none unsets an option" in text
    assert "--per_device_train_batch_size N|auto " in text and "--optim TEXT " in text


def test_beta_is_said_to_hold_the_model_to_its_reference(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(PreferenceRun, PREFERENCE_PRESETS, capsys)
    assert "higher values keep the model closer to the reference model" in text


def test_a_run_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        setattr(PRESETS["quickstart"], "max_steps", 3)  # noqa: B010  # which mypy would refuse


def test_what_weights_and_data_depend_on_is_fixed_on_resume() -> None:
    assert {"preset", "seed", "optim", "hidden_size", "dataset_name", "streaming"} <= set(BaseRun.fixed_on_resume())
    assert {"max_length", "lora_r", "assistant_only_loss"} <= set(InstructRun.fixed_on_resume())
    assert {"beta", "loss_type", "dataset_name", "simpo_gamma"} <= set(PreferenceRun.fixed_on_resume())
    assert not {"max_steps", "learning_rate", "output_dir", "save_steps"} & set(PreferenceRun.fixed_on_resume())


@pytest.mark.parametrize(
    ("limits", "wrong", "words"),
    [
        (Limits(), 0, "above zero"),
        (Limits(minimum=0), -1, "zero or more"),
        (Limits(minimum=2), 1, "at least 2"),
        (Limits(below=1), 1.0, "above zero and below 1"),
        (Limits(minimum=0, maximum=1), 1.5, "zero or more and at most 1"),
        (Limits(), float("nan"), "a finite number"),
        (Limits(minimum=0), float("-inf"), "a finite number"),
    ],
)
def test_limits_say_what_would_work(limits: Limits, wrong: float, words: str) -> None:
    with pytest.raises(UserError, match=f"^speed={wrong} must be {words}$"):
        limits.check("speed", wrong)


@pytest.mark.parametrize("value", [1, 0.5, True, False, None, "auto"])
def test_what_is_no_number_or_within_the_limits_is_accepted(value: object) -> None:
    Limits(maximum=1).check("speed", value)


@pytest.mark.parametrize("flag", ["--streaming=false", "--no_streaming", "--no-streaming"])
def test_an_option_that_is_on_can_be_turned_off(flag: str) -> None:
    assert parse_run(BaseRun, PRESETS, [flag]).streaming is False


@pytest.mark.parametrize("flag", ["--per_device_train_batch_size", "--per-device-train-batch-size"])
def test_the_micro_batch_can_be_left_open_in_either_spelling(flag: str) -> None:
    assert parse_run(BaseRun, PRESETS, [flag, "auto"]).auto_find_batch_size
    assert parse_run(InstructRun, INSTRUCT_PRESETS, [f"{flag}=4"]).per_device_train_batch_size == 4


def test_the_options_of_a_command_are_parsed_alike() -> None:
    assert parse_options(Preparation, ["--validation_fraction=0.5"]).validation_fraction == 0.5
    with pytest.raises(UserError, match="did you mean --output_dir"):
        parse_options(Preparation, ["--outputdir=x"])
