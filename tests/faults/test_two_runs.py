"""Two commands that want one folder at the same time: one has it, and what it leaves is that of an undisturbed one."""

from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from tests.faults.conftest import Tally, Undisturbed
from tests.faults.equality import unequal
from tests.faults.runs import PREPARE, SEED, Case, of_one_process, resume

CHOSEN = of_one_process("base, prepared", "fgpt prepare")
RUNS = 1


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("case", CHOSEN, ids=lambda case: case.name)
def test_two_at_once_leave_what_one_leaves(
    case: Case, corpus: Path, undisturbed: Callable[[Case], Undisturbed], tmp_path: Path, tally: Tally
) -> None:
    expected, chance = undisturbed(case), Random(f"{SEED} {case.name}")
    for number in range(RUNS):
        folder = tmp_path / f"run{number}"
        first = resume(case, corpus, folder)
        first.forked.process.join(timeout=chance.choice([0, expected.seconds / 2]))
        second = resume(case, corpus, folder)
        codes = sorted(run.forked.wait().returncode or 0 for run in (first, second))
        tally("two runs in one folder")
        if codes != [0, 0]:  # the second one waits for prepared rows, or came when the first one had ended
            assert codes == [0, 2] and case is not PREPARE, first.forked.stderr + second.forked.stderr
            refused = first if first.forked.returncode else second
            assert "is being written to by another run" in refused.fail_with_one_line()
        assert unequal(folder, expected.folder) == []
