"""SIGTERM and SIGINT at random moments, once or twice: a clean end, an exit code that says so, and an equal run."""

import re
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random

import pytest

from fgpt_hf.runtime import signals
from tests.faults.conftest import Tally, Undisturbed
from tests.faults.equality import unequal
from tests.faults.runs import CASES, LONG, SEED, Case, Disturbed, resume

SHORT = ["base, prepared by the run itself", "preference"]
CHOSEN = [case for case in CASES if LONG or case.name in SHORT]
RUNS = 3 if LONG else 1


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("case", CHOSEN, ids=lambda case: case.name)
def test_a_run_that_is_asked_to_stop_ends_cleanly_and_goes_on_as_an_undisturbed_one(
    case: Case, corpus: Path, undisturbed: Callable[[Case], Undisturbed], tmp_path: Path, tally: Tally
) -> None:
    expected, chance = undisturbed(case), Random(f"{SEED} {case.name}")
    for number in range(RUNS):
        folder = tmp_path / f"run{number}"
        for _ in range(2):
            asked, times = chance.choice([signal.SIGTERM, signal.SIGINT]), chance.choice([1, 2])
            moment = chance.uniform(0.1, 0.8 * expected.seconds)
            print(f"{case.name}, {folder.name}: {asked.name} after {moment:.2f} s, {times} times")
            run = started(case, corpus, folder)
            run.forked.process.join(timeout=moment)
            for _ in range(times):
                run.signal(asked)
                time.sleep(chance.uniform(0, 0.5))
            run.forked.wait()
            if run.forked.returncode:
                tally(f"{asked.name}{', twice' if times == 2 else ''}")
            if case.processes == 1:  # torchrun has an end of its own
                assert run.forked.returncode in (0, 128 + asked), run.forked.stderr[-6000:]
                assert run.forked.returncode or (folder / "model").is_dir()
                assert "Traceback" not in without_ignored(run.forked.stderr), run.forked.stderr[-6000:]
        resume(case, corpus, folder).succeed()
        assert unequal(folder, expected.folder) == []


def started(case: Case, corpus: Path, folder: Path) -> Disturbed:
    """Start or resume a run, and return when its script begins."""
    marker = folder.with_name(f"{folder.name}-started")
    marker.unlink(missing_ok=True)
    run = resume(case, corpus, folder, fault=partial(begin, str(marker)))
    while not marker.exists():
        assert run.forked.returncode is None, run.forked.stderr
        time.sleep(0.01)
    return run


def without_ignored(errors: str) -> str:
    """Remove what Python prints where a signal arrives as it forgets an object: it goes on, and says so."""
    return re.sub(r"Exception ignored in:.*?\n(KeyboardInterrupt|SystemExit)[^\n]*\n", "", errors, flags=re.DOTALL)


def begin(marker: str) -> None:
    """Let signals end nothing until the script takes them and after it has ended, and a second one be one soon."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: None)
    signals.SAME_REQUEST_SECONDS = 0.2
    Path(marker).touch()
