"""What the quickstart has learned is said from what its runs have measured."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks import quickstart
from benchmarks.quickstart import Change, measure, read_record

MEASURED = {
    "base": {"eval_loss": (10.8, 3.9), "eval_bits_per_byte": (5.6, 2.0)},
    "instruct": {
        "answers_ended": (0.0, 1.0),
        "basic-qa/exact_match": (0.0, 0.99),
        "capitals-unseen/exact_match": (0.0, 0.9),
        "capitals-unseen/exact_match_stderr": (0.0, 0.02),
    },
    "preference": {"eval_rewards/margins": (0.0, 0.5)},
}


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for stage, values in MEASURED.items():
        (tmp_path / stage).mkdir()
        lines = [
            {"step": step, "tokens": step, "seconds": step} | {name: value[step] for name, value in values.items()}
            for step in (0, 1)
        ]
        (tmp_path / stage / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(quickstart, "compressors", lambda: {"gzip": 2.5})
    return tmp_path


def test_each_gain_has_its_line_before_and_after(runs: Path) -> None:
    lines = measure(runs).lines
    for expected in ("10.80 -> 3.90", "5.60 -> 2.00 (gzip 2.50)", "0% -> 99%", "0% -> 90% ± 2%", "0.00 -> 0.50"):
        assert any(line.endswith(expected) or expected in line for line in lines), expected
    assert len(lines) < 10


def test_a_record_is_read_as_it_was_written(runs: Path, tmp_path: Path) -> None:
    record = measure(runs)
    (tmp_path / "record.json").write_text(json.dumps(asdict(record)))
    assert read_record(tmp_path / "record.json") == record
    assert record.unseen_capitals == Change(0.0, 0.9, 0.02)


def test_text_is_compressed_below_a_byte_a_character() -> None:
    bits = quickstart.compressors()
    assert 1 < bits["gzip"] < 8 and 1 < bits["token frequencies"] < 8
