"""Muon by shares: whatever processes hold of the matrices, each moves as torch's Muon moves it on one of them."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from fgpt_hf.config.parser import parse_run
from fgpt_hf.runtime.distributed import start_accelerator
from fgpt_hf.training import muon
from fgpt_hf.training.muon import Muon
from tests.support.launched import Launched
from tests.support.loop_run import TINY, TinyRun

SHAPES = ((24, 16), (16, 24), (2, 8), (24, 16), (7, 7), (24, 16), (16, 24))  # some have fewer rows than processes


def compare_with_torch(arguments: Sequence[str]) -> None:
    """Move matrices for three steps, whole or sharded, and print whether all are where torch's Muon moves them."""
    run = parse_run(TinyRun, {"tiny": TINY}, ["--preset=tiny", *arguments])
    accelerator = start_accelerator(run)
    vars(muon)["supports_bf16"] = lambda device: True  # as torch's Muon assumes
    mesh = init_device_mesh("cpu", (accelerator.num_processes,))
    random = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=random) for shape in SHAPES]

    def held(whole: Tensor) -> Tensor:
        return distribute_tensor(whole, mesh, [Shard(0)]) if run.fsdp else whole.clone()

    weights, expected = ([nn.Parameter(make(each)) for each in start] for make in (held, torch.clone))
    optimizers = [
        Muon(weights, lr=0.02, adjust_lr_fn="match_rms_adamw"),
        torch.optim.Muon(expected, lr=0.02, adjust_lr_fn="match_rms_adamw"),
    ]
    for _ in range(3):
        for weight, other in zip(weights, expected, strict=True):
            other.grad = torch.randn(other.shape, generator=random)
            weight.grad = held(other.grad)
        for optimizer in optimizers:
            optimizer.step()
    whole = [weight.full_tensor() if isinstance(weight, DTensor) else weight for weight in weights]
    print(all(torch.equal(one, other) for one, other in zip(whole, expected, strict=True)))


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True], ids=["replicated", "sharded"])
@pytest.mark.parametrize("processes", [2, 3])
def test_each_process_makes_a_share_of_torchs_products(processes: int, sharded: bool, tmp_path: Path) -> None:
    launched = Launched(tmp_path / "run", f"--fsdp={sharded}", processes=processes, main=compare_with_torch).wait()
    assert launched.exit_codes == [0] * processes, launched.errors
    assert [output.splitlines()[-1] for output in launched.outputs] == ["True"] * processes
