"""SIGKILL at random moments: resumed to their end, runs equal undisturbed ones bit for bit."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random

import pytest

from tests.faults.conftest import Tally, Undisturbed
from tests.faults.equality import unequal
from tests.faults.runs import CASES, LONG, PREPARE, PREPARE_IN_PROCESSES, SEED, Case, caches_of, kill_at, resume

SHORT = ["base, streamed", "instruct, two processes", "preference", "fgpt prepare"]
CHOSEN = [case for case in (*CASES, PREPARE, PREPARE_IN_PROCESSES) if LONG or case.name in SHORT]
RUNS = 6 if LONG else 1


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("case", CHOSEN, ids=lambda case: case.name)
def test_a_killed_run_ends_as_an_undisturbed_one(
    case: Case, corpus: Path, undisturbed: Callable[[Case], Undisturbed], tmp_path: Path, tally: Tally
) -> None:
    expected, chance = undisturbed(case), Random(f"{SEED} {case.name}")
    for number in range(RUNS):
        folder = tmp_path / f"run{number}"
        for _ in range(chance.randint(1, 3)):
            if kill_once(case, corpus, folder, expected, chance):
                tally(f"kill: {case.name}")
        resume(case, corpus, folder).succeed()
        assert unequal(folder, expected.folder) == []
        assert not list(tmp_path.rglob("*.partial"))


def kill_once(case: Case, corpus: Path, folder: Path, expected: Undisturbed, chance: Random) -> bool:
    """Start or resume a run and kill it, by the clock or as it changes a file; return whether it was killed."""
    if case.processes == 1 and chance.random() < 0.5:
        operation = chance.randint(1, expected.changes)
        print(f"{case.name}, {folder.name}: killed at change {operation} of {expected.changes}")
        fault = partial(kill_at, operation, (str(folder), str(caches_of(folder))))
        return resume(case, corpus, folder, fault=fault).forked.wait().returncode == -9
    moment = chance.uniform(0, expected.seconds)
    print(f"{case.name}, {folder.name}: killed after {moment:.2f} of {expected.seconds:.2f} s")
    run = resume(case, corpus, folder)
    run.forked.process.join(timeout=moment)
    return run.kill(chance)
