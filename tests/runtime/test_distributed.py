"""What the processes of a run must decide alike, they decide from what all of them have."""

import os
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import pytest
from accelerate.utils import broadcast_object_list

from fgpt_hf.config.parser import parse_run
from fgpt_hf.config.presets import PRESETS
from fgpt_hf.config.runs import BaseRun
from fgpt_hf.runtime import distributed, hardware
from fgpt_hf.runtime.distributed import require_shared_disk, shared_machine, start_accelerator, step_timeout
from fgpt_hf.runtime.hardware import Machine
from fgpt_hf.runtime.network import network_config
from fgpt_hf.runtime.plan import plan_training
from fgpt_hf.runtime.workload import Workload
from tests.support.launched import Launched

OPEN = ["--preset=quickstart", "--per_device_train_batch_size=auto", "--gradient_accumulation_steps=8", "--bf16=false"]
FREE_BYTES = (10**10, 75 * 10**7)  # by rank


def choose(arguments: Sequence[str]) -> None:
    """Print the micro-batch that a process chooses, each of which finds another amount of memory free."""
    run = parse_run(BaseRun, PRESETS, [*OPEN, *arguments])
    accelerator = start_accelerator(run)
    hardware._free_memory_bytes = lambda: FREE_BYTES[accelerator.process_index]
    print(plan_training(Workload(run, network_config(run), shared_machine(accelerator))).rows)


def share(arguments: Sequence[str]) -> None:
    """Look for one folder on all processes, or for another one on each, as on machines with disks of their own."""
    own_disks = "--own_disks" in arguments
    run = parse_run(BaseRun, PRESETS, [*OPEN, *(flag for flag in arguments if flag != "--own_disks")])
    accelerator = start_accelerator(run)
    distributed.SHARED_WITHIN = 1
    disk = run.folder / str(accelerator.process_index if own_disks else 0)
    disk.mkdir(parents=True, exist_ok=True)
    require_shared_disk(disk / "run", accelerator)


@pytest.mark.slow
def test_machines_without_a_shared_disk_are_refused_on_all_processes(tmp_path: Path) -> None:
    done = Launched(tmp_path / "run", processes=2, main=share).wait()
    assert done.exit_codes == [0, 0], done.errors
    assert not list((tmp_path / "run" / "0").iterdir())
    done = Launched(tmp_path / "run", "--own_disks", processes=2, main=share).wait()
    assert done.exit_codes == [2, 2]
    assert "process 1 does not see what the main process writes there: several machines need" in done.errors


@pytest.mark.slow
def test_processes_with_unlike_free_memory_choose_one_micro_batch(tmp_path: Path) -> None:
    run = parse_run(BaseRun, PRESETS, OPEN)
    machines = [Machine("a test", "cpu", free, has_bf16=False, peak_flops=None, processes=2) for free in FREE_BYTES]
    most, least = (Workload(run, network_config(run), machine).largest_micro_batch() for machine in machines)
    assert most != least
    done = Launched(tmp_path / "run", processes=2, main=choose).wait()
    assert done.exit_codes == [0, 0], done.errors
    assert [int(output.splitlines()[-1]) for output in done.outputs] == [least, least]


CONNECT, WORK, STEP = 4.0, 5.0, 1.0  # seconds


def wait_for_the_main_process(arguments: Sequence[str]) -> None:
    """Let the main process work alone, for longer than a process waits for the others to connect or in a step."""
    distributed.RENDEZVOUS_TIMEOUT, distributed.STEP_TIMEOUT = timedelta(seconds=CONNECT), timedelta(seconds=STEP)
    run = parse_run(BaseRun, PRESETS, [*OPEN, *arguments])
    note(run.folder, f"ready {os.environ['RANK']}")
    wait_for(run.folder / "ready 0", run.folder / "ready 1")  # the time to connect begins when both can
    accelerator = start_accelerator(run)
    found = [accelerator.process_index]
    if accelerator.is_main_process:
        time.sleep(WORK)
    broadcast_object_list(found)
    print("heard of", found[0])
    try:
        with step_timeout():
            if accelerator.is_main_process:
                wait_for(run.folder / "timed out")
            accelerator.wait_for_everyone()
    finally:
        note(run.folder, "timed out")


def note(folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).touch()


def wait_for(*paths: Path) -> None:
    while not all(path.exists() for path in paths):
        time.sleep(0.01)


@pytest.mark.slow
def test_processes_wait_for_one_that_works_alone_but_not_for_a_lost_one_among_steps(tmp_path: Path) -> None:
    done = Launched(tmp_path / "run", processes=2, main=wait_for_the_main_process).wait()
    assert [output.splitlines()[-1] for output in done.outputs] == ["heard of 0", "heard of 0"]
    assert all(done.exit_codes) and "Timed out waiting 1000ms" in done.all_errors[1]
