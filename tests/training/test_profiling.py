"""`--profile N` leaves a trace and a table of N steps, and changes nothing else."""

import json
import re
from pathlib import Path

from tests.training.test_loop import assert_equal_runs, refusal, succeed


def test_a_profile_has_a_trace_and_a_table(tmp_path: Path) -> None:
    succeed(tmp_path / "plain", "--max_steps=6")
    output = succeed(tmp_path / "profiled", "--max_steps=6", "--profile=3")
    folder = tmp_path / "profiled" / "profile"
    events = {str(event["name"]) for event in json.loads((folder / "trace.json").read_text())["traceEvents"]}
    assert len([name for name in events if name.startswith("ProfilerStep#")]) == 3
    listed = set(re.findall(r"^ *(aten::\w+)", (folder / "operations.txt").read_text(), re.MULTILINE))
    assert "aten::mm" in events and len(listed) > 9 and listed < events  # those that take longest
    assert "profile of 3 steps" in output
    assert_equal_runs(tmp_path / "profiled", tmp_path / "plain")


def test_a_profile_of_fewer_than_no_steps_is_refused(tmp_path: Path) -> None:
    assert "profile=-1 must be zero or more" in refusal(tmp_path / "run", "--profile=-1")


def test_a_run_too_short_for_its_profile_says_so(tmp_path: Path) -> None:
    output = succeed(tmp_path / "run", "--max_steps=2", "--profile=3")
    assert "profile=3 needs 5 steps, and the run took 2: it shows fewer steps, or none" in output
