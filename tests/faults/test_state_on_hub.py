"""Runs that keep their state on the Hub, killed on machine after machine: they end as undisturbed ones, bit for bit."""

import json
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import Random

import pytest
import yaml
from huggingface_hub import constants

from fgpt_hf import retries
from fgpt_hf.hub.state import BRANCH, STATE
from fgpt_hf.training.checkpoints import checkpoint_name, checkpoints, step_of
from tests.faults.conftest import Tally, Undisturbed
from tests.faults.equality import contents
from tests.faults.runs import CASES, LONG, SEED, Case, Disturbed, caches_of
from tests.support.loopback_hub import WRITE_TOKEN, LoopbackHub

REPO = "tester/tiny"
KILLS, STEPS = (20, 100) if LONG else (2, 6)
LENGTH = (f"--max_steps={STEPS}", f"--eval_steps={STEPS // 2}", f"--sample_steps={STEPS // 2}")
NAMES = ["base, streamed", "instruct", "preference", "base, prepared, two processes", "preference, two processes"]
CHOSEN = [replace(case, options=(*case.options, *LENGTH)) for case in CASES if case.name in NAMES[: 5 if LONG else 1]]
# What goes wrong on the way to the Hub, while the state is uploaded or downloaded.
UPLOADS = (("PUT", r"\.git/lfs/"), ("POST", r"/preupload/"), ("POST", r"/commit/"), ("POST", r"/super-squash/"))
DOWNLOADS = (("GET", r"/resolve/"), ("HEAD", r"/resolve/"), ("GET", r"/api/models/[^/]+/[^/]+/revision/"))
TROUBLES = ({"status": 503}, {"drop": True}, {"delay": 0.3}, {"drop_after": 20})


@dataclass
class Machines:
    """One machine after the other, each with an empty disk, and a Hub that all of them reach."""

    server: LoopbackHub
    case: Case
    corpus: Path
    folder: Path
    chance: Random

    def start(self, case: Case | None = None) -> Disturbed:
        """Start the run on a new machine, by the same command or by one that names the Hub; or another case of it."""
        for path in (self.folder, caches_of(self.folder)):
            shutil.rmtree(path, ignore_errors=True)
        flags = ["--push_to_hub", f"--hub_model_id={REPO}", "--hub_strategy=checkpoint"]
        flags += ["--resume_from_checkpoint=hub"] if case or self.chance.random() < 0.5 else []
        return Disturbed(
            case or self.case, self.corpus, self.folder, *flags, fault=partial(use_hub, self.server.url, self.folder)
        )

    def trouble(self) -> None:
        """Let something go wrong with the next requests."""
        for method, path in self.chance.sample((*UPLOADS, *DOWNLOADS), 3):
            fault = self.chance.choice(TROUBLES)
            self.server.fail(method, path, times=self.chance.randint(1, 2), **fault)

    def wait_for_requests(self, run: Disturbed, number: int) -> None:
        """Wait until the Hub has had so many more requests, which are few while a run starts and many in an upload."""
        wanted = len(self.server.requests) + number
        while len(self.server.requests) < wanted and run.forked.returncode is None:
            time.sleep(0.001)
        time.sleep(self.chance.uniform(0, 0.01))

    def step(self) -> int:
        """Return the step of the state on the Hub, 0 if there is none."""
        repo = self.server.endpoints.repos.get(("model", REPO))
        files = repo.files(BRANCH) if repo and BRANCH in repo.branches else {}
        return int(json.loads(files[STATE])["step"]) if STATE in files else 0


def use_hub(url: str, folder: Path) -> None:
    """Take a loopback Hub for the Hub, in a process that has imported all."""
    template = "/{repo_id}/resolve/{revision}/{filename}"
    values = {"ENDPOINT": url, "HUGGINGFACE_CO_URL_TEMPLATE": url + template, "HF_HUB_DISABLE_XET": True}
    values |= {"HF_HUB_CACHE": str(caches_of(folder) / "hub"), "HF_HUB_OFFLINE": False}
    for name, value in values.items():
        setattr(constants, name, value)
    os.environ["HF_TOKEN"] = WRITE_TOKEN
    retries.FIRST_WAIT_SECONDS = 0.05


@pytest.fixture
def machines(corpus: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Machines]:
    case = request.param
    with LoopbackHub() as server:
        yield Machines(server, case, corpus, tmp_path / "run", Random(f"{SEED} hub {case.name}"))


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("machines", CHOSEN, ids=lambda case: case.name, indirect=True)
def test_a_run_goes_on_from_the_hub_alone_whatever_its_machines_and_the_network_do(
    machines: Machines, undisturbed: Callable[[Case], Undisturbed], tally: Tally
) -> None:
    expected = undisturbed(machines.case)
    reached = [0]
    for _ in range(KILLS):
        machines.trouble()
        run = machines.start()
        machines.wait_for_requests(run, machines.chance.randint(1, 80))
        if run.kill(machines.chance):
            tally(f"kill, and a new machine: {machines.case.name}")
        reached.append(machines.step())
    print(f"{machines.case.name}: the states on the Hub were of the steps {reached}")
    assert reached == sorted(reached) and (reached[-1] > 0 or not LONG)
    machines.start().succeed()
    assert unequal(machines.folder, expected.folder) == []
    assert len(machines.server.repo("model", REPO).history(BRANCH)) <= 2  # 2 if the last kill came before the squash


# In the short form a single change, from two processes to one; dropout would differ with their number.
PROCESSES = [2, *Random(f"{SEED} processes").choices([1, 2], k=KILLS)] if LONG else [2, 1]
CHANGING = [
    replace(case, options=(*case.options, *LENGTH, *(["--dropout=0"] if case.script == "train_base" else [])))
    for case in CASES
    if case.name in (["base, prepared", "instruct", "preference"] if LONG else ["instruct"])
]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("machines", CHANGING, ids=lambda case: case.name, indirect=True)
def test_machines_with_other_numbers_of_processes_go_on_as_they_would_from_a_disk(
    machines: Machines, corpus: Path, tmp_path: Path, tally: Tally
) -> None:
    """Sums are rounded by the number of processes, so the other run has the same numbers from the same steps on."""
    begun: list[tuple[int, int]] = []  # the step and the number of processes of each machine
    for processes in PROCESSES[:-1]:
        begun.append((machines.step(), processes))
        run = machines.start(replace(machines.case, processes=processes))
        wanted = begun[-1][0] + 1
        while machines.step() < wanted and run.forked.returncode is None:
            time.sleep(0.01)
        time.sleep(machines.chance.uniform(0, 0.5))
        if run.kill(machines.chance):
            tally(f"kill, and a machine with other processes: {machines.case.name}")
    begun.append((machines.step(), PROCESSES[-1]))
    machines.start(replace(machines.case, processes=PROCESSES[-1])).succeed()
    print(f"{machines.case.name}: (step, processes) {begun}")
    assert begun[1][0] > 0

    repeat_on_disk(machines.case, corpus, tmp_path / "disk", begun)
    options = {"save_total_limit", "per_device_train_batch_size"}
    assert unequal(machines.folder, tmp_path / "disk", options) == []


def repeat_on_disk(case: Case, corpus: Path, folder: Path, begun: list[tuple[int, int]]) -> None:
    """Train on one machine, with these numbers of processes from these steps on."""
    ends, saved = [step for step, _ in begun[1:]] + [STEPS], folder / "checkpoints"
    for (begin, processes), end in zip(begun, ends, strict=True):
        for checkpoint in checkpoints(saved):
            if step_of(checkpoint) > begin:
                shutil.rmtree(checkpoint)
        flags = [f"--resume_from_checkpoint={saved / checkpoint_name(begin)}"] if begin else []
        run = Disturbed(replace(case, processes=processes), corpus, folder, *flags, f"--save_total_limit={STEPS}")
        if end == STEPS:
            run.succeed()
            continue
        is_running = True
        while not (saved / checkpoint_name(end)).exists():
            assert is_running, run.forked.stderr[-6000:]
            time.sleep(0.01)
            is_running = run.forked.returncode is None
        run.kill(Random(SEED))


def unequal(run: Path, expected: Path, options: Collection[str] = ()) -> list[str]:
    """Return the names of all that differs, options of the Hub and others, and earlier checkpoints, left out."""
    one, other = contents(run), contents(expected)
    for found in (one, other):
        recorded = found["run.yaml"].items()
        found["run.yaml"] = {name: value for name, value in recorded if "hub" not in name and name not in options}
    last = checkpoint_name(yaml.safe_load((run / "run.yaml").read_text())["max_steps"])
    assert f"{last}/model.safetensors" in one
    of_last = {name for name in one.keys() | other.keys() if not name.startswith("step_") or name.startswith(last)}
    return sorted(name for name in of_last if one.get(name) != other.get(name))
