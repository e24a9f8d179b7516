"""A disk that is full at any moment: one line, earlier checkpoints whole, and an equal run once there is space."""

import math
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from random import Random

import pytest

from fgpt_hf.files import integrity_error
from fgpt_hf.training.checkpoints import checkpoints
from tests.faults.conftest import Tally, Undisturbed
from tests.faults.equality import unequal
from tests.faults.runs import (
    LONG,
    SEED,
    Case,
    Disturbed,
    caches_of,
    full_disk_from,
    of_one_process,
    resume,
)

CHOSEN = of_one_process("base, streamed", "fgpt prepare")
RUNS = 2 if LONG else 1
MEGABYTE, PAGE = 1_000_000, 4096


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("case", CHOSEN, ids=lambda case: case.name)
def test_a_run_goes_on_after_a_write_that_failed(
    case: Case, corpus: Path, undisturbed: Callable[[Case], Undisturbed], tmp_path: Path, tally: Tally
) -> None:
    """A limit on the size of files stands for a full disk where torch writes, an error of Python's `open` elsewhere."""
    expected, chance = undisturbed(case), Random(f"{SEED} {case.name}")
    for number in range(RUNS):
        folder = tmp_path / f"run{number}"
        operation = chance.randint(1, expected.changes)
        size = round(math.exp(chance.uniform(math.log(2000), math.log(20 * MEGABYTE))))
        print(f"{case.name}, {folder.name}: full at change {operation} of {expected.changes}, then at {size} bytes")
        fault = partial(full_disk_from, operation, (str(folder), str(caches_of(folder))))
        check(resume(case, corpus, folder, fault=fault), folder, tally)
        check(resume(case, corpus, folder, file_size_limit=size), folder, tally)
        resume(case, corpus, folder).succeed()
        assert unequal(folder, expected.folder) == []


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("a disk can be mounted by root only")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.skipif(not LONG, reason="part of the long form")
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("case", CHOSEN, ids=lambda case: case.name)
def test_a_run_goes_on_after_a_disk_was_full(
    case: Case, corpus: Path, undisturbed: Callable[[Case], Undisturbed], tmp_path: Path, disk: Path, tally: Tally
) -> None:
    expected, chance = undisturbed(case), Random(f"{SEED} {case.name}")
    used = sum(path.stat().st_size for path in expected.folder.rglob("*") if path.is_file())
    for number in range(RUNS):
        folder = disk / f"run{number}"
        pages = math.exp(chance.uniform(math.log(used / 100), math.log(used * 1.2))) / PAGE
        size = max(4, round(pages)) * PAGE  # of no pages would be of any size
        print(f"{case.name}, {folder.name}: a disk of {size / MEGABYTE:.2f} MB for {used / MEGABYTE:.2f} MB")
        resize(disk, size)
        check(resume(case, corpus, folder, logs=tmp_path / "logs"), folder, tally)
        resize(disk, 10 * used + 100 * MEGABYTE)
        resume(case, corpus, folder, logs=tmp_path / "logs").succeed()
        assert unequal(folder, expected.folder) == []
        subprocess.run(["find", disk, "-mindepth", "1", "-delete"], check=True)


def resize(disk: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True)


def check(run: Disturbed, folder: Path, tally: Tally) -> None:
    """The run ended well, or with one line and with no checkpoint that is broken."""
    if run.forked.wait().returncode:
        run.fail_with_one_line()
        tally("disk full")
    assert [integrity_error(path) for path in checkpoints(folder / "checkpoints")].count(None) == len(
        checkpoints(folder / "checkpoints")
    )
