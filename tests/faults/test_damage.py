"""Files that are damaged between two starts: passed over or made again, or named in one line; never trained on."""

import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from tests.faults.conftest import Tally, Undisturbed
from tests.faults.equality import unequal
from tests.faults.runs import CASES, LONG, SEED, Case, Disturbed, caches_of, resume

RUNS = 6 if LONG else 2


def named(*names: str) -> list[Case]:
    return [case for case in CASES if case.name in names]


def damage(path: Path, chance: Random) -> str:
    """Damage a file as disks, copies and hands do; return how."""
    content = path.read_bytes()
    place = chance.randrange(max(1, len(content)))
    how = chance.choice(["truncated", "flipped", "zeroed", "emptied", "deleted"])
    if how == "deleted":
        path.unlink()
        return how
    changed = {
        "truncated": content[:place],
        "flipped": content[:place] + bytes([content[place] ^ 1 << chance.randrange(8)]) + content[place + 1 :],
        "zeroed": content[:place] + bytes(min(512, len(content) - place)) + content[place + 512 :],
        "emptied": b"",
    }
    path.write_bytes(changed[how])
    return f"{how} at {place} of {len(content)}"


def copy_of(expected: Undisturbed, folder: Path) -> Path:
    shutil.copytree(expected.folder, folder)
    if caches_of(expected.folder).exists():
        shutil.copytree(caches_of(expected.folder), caches_of(folder))
    return folder


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "case", named("base, streamed", "instruct, adapters", "preference"), ids=lambda case: case.name
)
def test_a_damaged_checkpoint_is_passed_over(
    case: Case, corpus: Path, undisturbed: Callable[[Case], Undisturbed], tmp_path: Path, tally: Tally
) -> None:
    expected, chance = undisturbed(case), Random(f"{SEED} {case.name}")
    for number in range(RUNS):
        folder = copy_of(expected, tmp_path / f"run{number}")
        path = chance.choice(sorted((folder / "checkpoints" / "step_00000006").iterdir()))
        print(f"{case.name}, {folder.name}: {path.name} {damage(path, chance)}")
        tally("damaged checkpoint")
        resume(case, corpus, folder).succeed()
        assert unequal(folder, expected.folder) == []


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("case", named("base, streamed", "instruct"), ids=lambda case: case.name)
def test_a_log_that_was_cut_anywhere_is_written_again(
    case: Case, corpus: Path, undisturbed: Callable[[Case], Undisturbed], tmp_path: Path, tally: Tally
) -> None:
    """As after a loss of power: the lines after the last checkpoint are there in part, cut inside a character too."""
    expected, chance = undisturbed(case), Random(f"{SEED} {case.name}")
    for number in range(RUNS):
        folder = copy_of(expected, tmp_path / f"run{number}")
        shutil.rmtree(folder / "checkpoints" / "step_00000006")
        for name in ("metrics.jsonl", "samples.jsonl"):
            content = (folder / name).read_bytes()
            begin = content.index(b'{"step": 6')
            many_bytes = [place for place in range(begin, len(content)) if content[place] & 0xC0 == 0x80]
            cut = chance.choice([chance.randrange(begin, len(content)), *many_bytes[:1]])
            (folder / name).write_bytes(content[:cut])
            print(f"{case.name}, {folder.name}: {name} cut at {cut} of {len(content)}")
        tally("torn log")
        resume(case, corpus, folder).succeed()
        assert unequal(folder, expected.folder) == []


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("case", named("base, prepared"), ids=lambda case: case.name)
def test_damaged_rows_are_named(case: Case, corpus: Path, tmp_path: Path, tally: Tally) -> None:
    chance = Random(f"{SEED} {case.name}")
    for number in range(4 * RUNS):
        own = tmp_path / f"corpus{number}"
        shutil.copytree(corpus, own)
        path = chance.choice(sorted(path for path in (own / "rows").rglob("*") if path.is_file()))
        print(f"{case.name}: {path.relative_to(own)} {damage(path, chance)}")
        tally("damaged rows")
        run = Disturbed(case, own, tmp_path / f"run{number}")
        assert str(own / "rows") in run.fail_with_one_line()
        assert not (tmp_path / f"run{number}").exists()


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "case", named("base, streamed", "base, prepared by the run itself", "preference"), ids=lambda case: case.name
)
def test_a_damaged_cache_is_made_again_or_named(
    case: Case, corpus: Path, undisturbed: Callable[[Case], Undisturbed], tmp_path: Path, tally: Tally
) -> None:
    expected, chance = undisturbed(case), Random(f"{SEED} {case.name}")
    for number in range(RUNS):
        folder = copy_of(expected, tmp_path / f"run{number}")
        shutil.rmtree(folder)
        files = [path for path in caches_of(folder).rglob("*") if path.is_file() and path.suffix != ".lock"]
        path = chance.choice(sorted(files))
        print(f"{case.name}: {path.relative_to(caches_of(folder))} {damage(path, chance)}")
        tally("damaged cache")
        run = resume(case, corpus, folder)
        if run.forked.wait().returncode:
            assert str(caches_of(folder)) in run.fail_with_one_line()
        else:
            assert unequal(folder, expected.folder) == []
