"""The processes of a run: how they find each other, share a model, exchange gradients and are told to stop."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object, set_seed
from torch import nn
from torch.distributed import DistError
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from fgpt_hf.config.runs import Run
from fgpt_hf.errors import UserError
from fgpt_hf.losses.objectives import Objective
from fgpt_hf.runtime.hardware import Machine, keep_freed_memory, supports_bf16, this_machine

T = TypeVar("T")


def start_accelerator(run: Run) -> Accelerator:
    """The processes and the device of a run, in the precision that it asks for, with its seed set.

    Raises:
        UserError: the device lacks that precision, a tracker is not installed, the processes do not find each other.
    """
    cpu = not torch.accelerator.is_available()  # Accelerate starts several processes on CPUs only when told
    try:
        device = PartialState(cpu, timeout=timedelta(minutes=10)).device
    except DistError as error:
        address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
        raise UserError(
            f"the processes cannot meet at {address}:{port}: is the port in use? Give another one "
            "(accelerate launch --main_process_port, torchrun --master_port)"
        ) from error
    if run.bf16 and not supports_bf16(device):
        raise UserError(f"bf16=true: this {device.type} has no bfloat16 arithmetic; leave the flag out or try --fp16")
    if run.fp16 and device.type != "cuda":
        raise UserError(f"fp16=true needs a CUDA GPU and this is a {device.type}; leave the flag out")
    bf16 = supports_bf16(device) and not run.fp16 if run.bf16 is None else run.bf16
    if run.report_to != "none" and find_spec(run.report_to) is None:
        raise UserError(f"report_to={run.report_to} is not installed: pip install {run.report_to}, or leave it out")
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision="bf16" if bf16 else "fp16" if run.fp16 else "no",
        log_with=None if run.report_to == "none" else run.report_to,
        project_dir=run.folder,
    )
    if device.type == "cpu":
        keep_freed_memory()
    set_seed(run.seed)
    return accelerator


def shared_machine(accelerator: Accelerator) -> Machine:
    """The device with the least free memory of all processes', for decisions that every process must take alike."""
    machines = gather_object([this_machine(accelerator.device, accelerator.num_processes)])
    return min(machines, key=lambda machine: machine.memory_bytes)


def shard(objective: Objective, accelerator: Accelerator) -> nn.Module:
    """Share the objective's parameters, gradients and optimizer state among all processes, layer by layer (FSDP2)."""
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    objective.to(accelerator.device)
    for layer in objective.model.get_decoder().layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(objective, mesh=mesh)
    register_fsdp_forward_method(objective, "examine")
    return objective


def examine(objective: Objective, check: Callable[[], T]) -> T:
    """Call `check`, which looks at the objective's model, on a model that it does not change, not even random numbers.

    Sharded parameters are whole meanwhile, so that a forward pass waits for no other process, which may have fewer.
    Nothing is compiled for what a check does: the shapes are too many, and training would be left without graphs.
    """
    layers = [module for module in objective.model.modules() if isinstance(module, FSDPModule)]

    def check_whole() -> T:
        for layer in layers:
            layer.set_reshard_after_forward(False, recurse=False)
            layer.unshard()
        try:
            return check()
        finally:
            for layer in layers:
                layer.set_reshard_after_forward(True, recurse=False)
                layer.reshard()

    devices = [torch.accelerator.current_device_index()] if torch.accelerator.is_available() else []
    with torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"):
        return objective.examine(check_whole)


def sync_gradients(forward: nn.Module, accelerator: Accelerator, last: bool) -> AbstractContextManager[None]:
    """Exchange gradients among processes after the last micro-batch only."""
    if isinstance(forward, FSDPModule):
        forward.set_requires_gradient_sync(last)
    return nullcontext() if last else accelerator.no_sync(forward)


def all_reduce_sum(accelerator: Accelerator, *values: float) -> list[float]:
    """Each value summed over all processes."""
    if accelerator.num_processes == 1:
        return list(values)
    return accelerator.reduce(torch.tensor(values, dtype=torch.float64, device=accelerator.device)).tolist()


def resolve_attn_implementation(run: Run, accelerator: Accelerator) -> str:
    """The implementation of attention that a run asks for, or the fastest that is installed for its device."""
    if run.attn_implementation != "auto":
        return run.attn_implementation
    if accelerator.device.type == "cuda" and accelerator.mixed_precision != "no":
        if is_flash_attn_3_available():
            return "flash_attention_3"
        if is_flash_attn_2_available():
            return "flash_attention_2"
    return "sdpa"


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Within, the first SIGINT or SIGTERM is noted for the loop to see, and a second one acts as ever."""
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        received.append(number)
        signal.signal(number, previous[number])

    previous: dict[int, Any] = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
