"""What the processes of a run must decide alike, they decide from what all of them have."""

from collections.abc import Sequence
from pathlib import Path

from fgpt_hf import devices
from fgpt_hf.command_line import parse_run
from fgpt_hf.devices import Machine
from fgpt_hf.estimate import largest_micro_batch, network
from fgpt_hf.forecast import fit_to_machine
from fgpt_hf.presets import PRESETS
from fgpt_hf.processes import shared_machine, start
from fgpt_hf.runs import BaseRun
from tests.test_training import Launched

OPEN = ["--preset=quickstart", "--per_device_train_batch_size=auto", "--gradient_accumulation_steps=8", "--bf16=false"]
FREE_BYTES = (10**10, 75 * 10**7)  # by rank


def choose(arguments: Sequence[str]) -> None:
    """Print the micro-batch that a process chooses, each of which finds another amount of memory free."""
    run = parse_run(BaseRun, PRESETS, [*OPEN, *arguments])
    accelerator = start(run)
    devices._free_memory_bytes = lambda: FREE_BYTES[accelerator.process_index]
    fit_to_machine(run, network(run), shared_machine(accelerator), lambda line: None)
    print(run.per_device_train_batch_size)


def test_processes_with_unlike_free_memory_choose_one_micro_batch(tmp_path: Path) -> None:
    run = parse_run(BaseRun, PRESETS, OPEN)
    machines = [Machine("a test", "cpu", free, has_bf16=False, peak_flops=None, processes=2) for free in FREE_BYTES]
    most, least = (largest_micro_batch(run, network(run), machine) for machine in machines)
    assert most != least
    done = Launched(tmp_path / "run", processes=2, main=choose).wait()
    assert done.exit_codes == [0, 0], done.errors
    assert [int((done.logs / f"{rank}.out").read_text().splitlines()[-1]) for rank in (0, 1)] == [least, least]
