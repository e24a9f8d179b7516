"""Advice is right, is given once, and is not given to runs that go well."""

import json
import math
import random
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from fgpt_hf.config.presets import INSTRUCT_PRESETS, PREFERENCE_PRESETS, PRESETS
from fgpt_hf.config.runs import Run
from fgpt_hf.training.advice import Adviser, RunFacts, bits_of_base
from fgpt_hf.training.records import Line
from tests.support.forked import run_command
from tests.support.run_folders import write_run

BASE, INSTRUCT, PREFERENCE = (presets["quickstart"] for presets in (PRESETS, INSTRUCT_PRESETS, PREFERENCE_PRESETS))


def advice(lines: Iterable[Line], run: Run = BASE, **facts: float | None) -> list[str]:
    adviser = Adviser(RunFacts(run, **{"max_steps": 160, "parameters": 17_682_432, **facts}))
    return [said for line in lines for said in adviser.observe(line)]


def curve(
    start: float, end: float, steps: int = 160, every: int = 10, noise: float = 0.15, seed: int = 0
) -> list[dict[str, float]]:
    """A training loss that falls as those of small models do: fast, then slowly, with noise from batch to batch."""
    numbers = random.Random(seed)
    shape = [end + (start - end) * math.exp(-4 * step / steps) for step in range(every, steps + 1, every)]
    return [{"step": every * n, "loss": loss + numbers.gauss(0, noise)} for n, loss in enumerate(shape, start=1)]


def with_validation(lines: list[dict[str, float]], *losses: float) -> list[dict[str, float]]:
    at = [round(index * (len(lines) - 1) / (len(losses) - 1)) for index in range(len(losses))]
    for index, loss in zip(at, losses, strict=True):
        lines[index]["eval_loss"] = loss
    return lines


@pytest.mark.parametrize("seed", range(30))
def test_runs_that_go_well_are_left_alone(seed: int) -> None:
    """The three stages of the quickstart, with the README's figures and noise; a noisier run; and a long one."""
    base = [{"step": 0, "eval_loss": 10.83}, *with_validation(curve(10.8, 4.5, seed=seed), 9.0, 5.07, 4.57)]
    assert advice(base, text_tokens=13_445_611, epochs=0.03) == []
    answers = [{"step": 0, "eval_loss": 6.77, "eval_bits_per_byte": 2.42, "answers_ended": 0.0}]
    instruct = [*answers, *curve(7.9, 5.5, 50, 10, 0.3, seed), {"step": 50, "eval_loss": 5.5, "answers_ended": 1.0}]
    assert advice(instruct, INSTRUCT, max_steps=50, base_bits=2.37) == []
    pairs = [{"step": 0, "eval_loss": 0.693}, *curve(0.7, 0.5, 200, 1, 0.12, seed), {"step": 200, "answers_ended": 0.5}]
    assert advice(pairs, PREFERENCE) == []
    assert advice(curve(2.6, 1.1, 260, 1, 0.3, seed), replace(INSTRUCT, warmup_steps=5)) == []
    assert advice(curve(11, 2.6, 27_000, 50, 0.05, seed), replace(BASE, warmup_steps=700), max_steps=27_000) == []


def test_text_that_is_learnt_by_heart_is_told_from_text_that_is_learnt() -> None:
    (said,) = advice(with_validation(curve(10.8, 1.0), 10.8, 6.0, 5.5, 5.8, 6.1))
    assert "the validation loss rises (5.500 at step 90 -> 6.100) while the training loss falls" in said
    assert "--max_steps 90" in said and "--dropout 0.1" in said
    assert advice(with_validation(curve(10.8, 1.0), 10.8, 6.0, 5.5, 5.52, 5.54)) == []
    assert advice(with_validation(curve(10.8, 1.0), 10.8, 6.0, 5.5, 5.8, 5.4)) == []


@pytest.mark.parametrize("seed", range(10))
def test_a_loss_that_does_not_fall_is_said_after_the_warm_up(seed: int) -> None:
    numbers = random.Random(seed)
    flat = [{"step": step, "loss": 10.8 + step / 1000 + numbers.gauss(0, 0.02)} for step in range(1, 200)]
    (said,) = advice(flat, replace(BASE, learning_rate=1e-9))
    assert "the training loss has not fallen from step 21 to step" in said and "--learning_rate 1e-09" in said


@pytest.mark.parametrize("seed", range(10))
def test_a_learning_rate_that_is_too_high_is_named_with_a_lower_one(seed: int) -> None:
    falls, rises = curve(10.8, 6.0, 100, 5, 0.2, seed), curve(9.0, 12.0, 100, 5, 0.5, seed)
    lines = [*falls, *({**line, "step": 100 + line["step"]} for line in rises)]
    said = [line for line in advice(lines, replace(BASE, learning_rate=0.1)) if "is too high" in line]
    assert len(said) == 1 and "--learning_rate 0.1 is too high; try 0.03" in said[0]


def test_one_bad_batch_is_no_divergence_and_values_that_are_no_numbers_are_passed_over() -> None:
    lines = curve(10.8, 4.5, 160, 5)
    lines[20]["loss"] = 9.0
    lines[25]["loss"] = float("nan")
    assert advice(lines) == []


@pytest.mark.parametrize(
    ("preset", "tokens", "fits"),
    [
        ("fgpt-712m", 20_000_000, "--preset fgpt-124m"),
        ("fgpt-124m", 5_000_000, "--preset quickstart"),
        ("fgpt-124m", 5_000, "--preset quickstart"),
        ("quickstart", 48_000, "--hidden_size 128"),
        ("fgpt-124m-modern", 5_000, "--preset quickstart-modern"),
    ],
)
def test_too_little_text_names_the_preset_that_fits(preset: str, tokens: int, fits: str) -> None:
    sizes = {"fgpt-712m": 712_035_360, "fgpt-124m": 124_475_904, "quickstart": 17_682_432}
    sizes["fgpt-124m-modern"] = sizes["fgpt-124m"]
    facts: dict[str, float | None] = {"parameters": sizes[preset], "text_tokens": tokens}
    (said,) = advice([{"step": 0}, {"step": 1}], PRESETS[preset], **facts, epochs=7.0)
    assert f"{tokens:,} tokens of text are few" in said and "will see them 7 times" in said and f"({fits}" in said
    assert advice([{"step": 0}], PRESETS[preset], **facts, epochs=0.5) == []
    assert advice([{"step": 0}], PRESETS[preset], **facts, epochs=None) == []


@pytest.mark.parametrize(
    ("bits", "known", "is_strange"),
    [(4.5, 2.0, True), (4.5, 3.0, False), (3.5, 1.0, False), (4.5, None, False), (6, None, True)],
)
def test_a_language_that_the_base_never_saw_is_seen_in_its_bits(
    bits: float, known: float | None, is_strange: bool
) -> None:
    said = advice([{"step": 0, "eval_bits_per_byte": bits}], INSTRUCT, base_bits=known)
    assert bool(said) == is_strange
    assert advice([{"step": 0, "eval_bits_per_byte": bits}], BASE, base_bits=known) == []


def test_answers_that_never_end_are_said_at_the_end_or_the_second_time() -> None:
    none = [{"step": step, "answers_ended": 0.0} for step in (0, 50, 100)]
    assert advice(none[:2], INSTRUCT) == []
    assert "none of the sampled answers ends within --max_new_tokens 40" in advice(none, INSTRUCT)[0]
    assert len(advice(none[:2], INSTRUCT, max_steps=50)) == 1
    assert advice([*none[:2], {"step": 100, "answers_ended": 0.1}], INSTRUCT, max_steps=100) == []


def test_rules_look_at_a_long_run_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    monkeypatch.setattr("fgpt_hf.training.advice.RULES", [lambda lines, facts: looks.append(len(lines))])
    advice(({"step": step} for step in range(1, 20_001)), max_steps=20_000)
    assert len(looks) < 200 and looks[:10] == list(range(1, 11)) and looks[-1] == 20_000


def test_a_run_that_goes_on_is_not_told_again() -> None:
    lines = with_validation(curve(10.8, 1.0), 10.8, 6.0, 5.5, 5.8, 6.1)
    adviser = Adviser(RunFacts(BASE, 300, 17_682_432), earlier=lines)
    assert [adviser.observe({"step": 170, "loss": 1.0, "eval_loss": 6.3})] == [[]]


def test_what_a_base_run_reached_is_read_from_its_record(tmp_path: Path) -> None:
    base = write_run(tmp_path / "base")
    assert bits_of_base(replace(INSTRUCT, model_name_or_path=str(base))) == 1.5
    assert bits_of_base(replace(INSTRUCT, model_name_or_path=str(base / "model"))) == 1.5
    assert bits_of_base(replace(INSTRUCT, model_name_or_path="user/name")) is None
    (base / "metrics.jsonl").write_text("damaged\n")
    assert bits_of_base(replace(INSTRUCT, model_name_or_path=str(base))) is None


SMALL = [
    *("--preset=quickstart", "--per_device_train_batch_size=8", "--logging_steps=1", "--sample_steps=1000"),
    *("--save_steps=1000", "--max_eval_rows=8", "--eval_tasks="),
]


@pytest.mark.slow
def test_a_small_model_that_learns_twenty_sentences_and_then_meets_another_language(tmp_path: Path) -> None:
    words = [
        "river",
        "stone",
        "lantern",
        "orchard",
        "winter",
        "garden",
        "letter",
        "captain",
        "violin",
        "harbor",
        "meadow",
        "candle",
    ]
    numbers = random.Random(0)
    texts = [{"text": " ".join(numbers.choice(words) for _ in range(60))} for _ in range(20)]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    shape = ["--hidden_size=64", "--num_hidden_layers=2", "--num_attention_heads=2", "--max_position_embeddings=64"]
    base = [*SMALL, *shape, "--max_steps=150", "--eval_steps=10", "--learning_rate=0.02", "--validation_fraction=0.2"]
    files = [f"--dataset_name={tmp_path / 'few.jsonl'}", f"--output_dir={tmp_path / 'base'}"]
    done = run_command("train_base.py", *base, *files, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if "advice:" in line]
    assert sum("tokens of text are few for" in line for line in said) == 1
    assert sum("the validation loss rises" in line for line in said) == 1

    greek = ["καλημέρα", "θάλασσα", "ουρανός", "βιβλίο", "δρόμος", "παράθυρο"]
    chats = [{"prompt": f"Τι είναι {n};", "completion": " ".join(numbers.choices(greek, k=9))} for n in range(30)]
    (tmp_path / "greek.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    files = [f"--dataset_name={tmp_path / 'greek.jsonl'}", f"--output_dir={tmp_path / 'instruct'}"]
    start = [f"--model_name_or_path={tmp_path / 'base'}", "--max_steps=2", "--max_new_tokens=8"]
    done = run_command("train_instruct.py", *SMALL, *start, *files, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if "advice:" in line]
    assert sum("it has hardly seen their language" in line for line in said) == 1
