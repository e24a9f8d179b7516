"""Run on several processes: start them, shard a model, and reduce values.

A single process goes through the same functions, which then have nothing to exchange.
"""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from torch import nn
from torch.distributed import DistError
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from transformers import PreTrainedModel

from fgpt_hf.config.runs import Run
from fgpt_hf.errors import UserError
from fgpt_hf.losses.objectives import Objective
from fgpt_hf.model.evaluation_mode import evaluation_mode
from fgpt_hf.runtime.hardware import Machine, keep_freed_memory, supports_bf16, this_machine

Value = TypeVar("Value")

# How long a process waits for the others: to connect, for one that works alone, such as to download a state, and in a
# step, after which a machine is taken for lost.
RENDEZVOUS_TIMEOUT = timedelta(minutes=10)
SOLO_WORK_TIMEOUT = timedelta(days=1)
STEP_TIMEOUT = timedelta(minutes=30)
SHARED_WITHIN = 60  # seconds
PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # by Accelerate's names


def start_accelerator(run: Run) -> Accelerator:
    """Connect the processes of a run, choose device and precision, and set the seed.

    Every process but the first logs errors only. From here on, all wait for one that works alone, for up to a day.

    Raises:
        UserError: the device lacks the precision, the tracker is not installed, the processes cannot connect, or
            `fsdp` finds no launcher.
    """
    cpu = not torch.accelerator.is_available()  # Accelerate starts several processes on CPUs only when asked to
    device = _connect(cpu).device
    precision = mixed_precision(run, device)
    if run.report_to != "none" and find_spec(run.report_to) is None:
        raise UserError(
            f"report_to={run.report_to} is not installed: pip install {run.report_to} (all trackers are in "
            "'fgpt-hf[trackers]'), or leave it out"
        )
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=precision,
        log_with=None if run.report_to == "none" else run.report_to,
        project_dir=run.folder,
    )
    if run.fsdp and not dist.is_initialized():
        raise UserError("fsdp=true shards across processes: start the run with torchrun, or leave the flag out")
    wait_at_most(SOLO_WORK_TIMEOUT)
    if not accelerator.is_main_process:
        logging.getLogger("fgpt_hf").setLevel(logging.ERROR)
    if device.type == "cpu":
        keep_freed_memory()
    set_seed(run.seed)
    return accelerator


def _connect(cpu: bool) -> PartialState:
    """Wait for the other processes of the launcher."""
    try:
        return PartialState(cpu, timeout=RENDEZVOUS_TIMEOUT)
    except DistError as error:
        address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
        raise UserError(
            f"the processes cannot connect at {address}:{port}: is the port in use? Choose another one "
            "(accelerate launch --main_process_port, torchrun --master_port)"
        ) from error


@contextmanager
def step_timeout() -> Iterator[None]:
    """Within the block, wait no longer than `STEP_TIMEOUT` for the other processes."""
    wait_at_most(STEP_TIMEOUT)
    try:
        yield
    finally:
        wait_at_most(SOLO_WORK_TIMEOUT)


def wait_at_most(timeout: timedelta, processes: dist.ProcessGroup | None = None) -> None:
    """Let processes, those of the run or of another group, wait no longer than this for each other from now on."""
    if dist.is_initialized():
        _set_pg_timeout(timeout, processes)


def mixed_precision(run: Run, device: torch.device) -> str:
    """Return Accelerate's name for the precision of the products: what the run asks for, else bfloat16 if native.

    Raises:
        UserError: the device lacks what the run asks for.
    """
    if run.bf16 and not supports_bf16(device):
        raise UserError(f"bf16=true: this {device.type} has no bfloat16 arithmetic; leave the flag out or try --fp16")
    if run.fp16 and device.type != "cuda":
        raise UserError(f"fp16=true needs a CUDA GPU and this is a {device.type}; leave the flag out")
    if run.fp16:
        return "fp16"
    return "bf16" if (supports_bf16(device) if run.bf16 is None else run.bf16) else "no"


def from_main_process(value: Value) -> Value:
    """Return the main process's value, so that all processes decide the same; every process calls it."""
    values = [value]
    broadcast_object_list(values)
    return values[0]


def shared_machine(accelerator: Accelerator) -> Machine:
    """Return the machine with the least free memory among all processes, so that all decide the same."""
    machines: list[Machine] = gather_object([this_machine(accelerator.device, accelerator.num_processes)])
    return min(machines, key=lambda machine: machine.memory_bytes)


def require_shared_disk(folder: Path, accelerator: Accelerator) -> None:
    """Refuse a folder that is not the same for all processes, which write to it together; every process calls it.

    Raises:
        UserError: a process does not see what the main process writes next to the folder, on all processes.
    """
    if accelerator.num_processes == 1:
        return
    probe = folder.with_name(from_main_process(f".{folder.name}.{uuid4().hex}"))
    if accelerator.is_main_process:
        probe.touch()
    accelerator.wait_for_everyone()
    seen = gather_object([_appears(probe)])
    if accelerator.is_main_process:
        probe.unlink()
    if not all(seen):
        raise UserError(
            f"output_dir={folder}: process {seen.index(False)} does not see what the main process writes there: "
            "several machines need an output_dir on a shared disk"
        )


def _appears(path: Path) -> bool:
    """Return whether there is such a file, or will be soon: network file systems take a while to show a new one."""
    until = time.monotonic() + SHARED_WITHIN
    while not path.exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.5)
    return True


def shard(objective: Objective, accelerator: Accelerator) -> nn.Module:
    """Shard parameters, gradients and optimizer state across all processes, layer by layer (FSDP2)."""
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    objective.to(accelerator.device)
    for layer in layers_of(objective.model):
        fully_shard(layer, mesh=mesh)
    fully_shard(objective, mesh=mesh)
    register_fsdp_forward_method(objective, "gather")
    return objective


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """Return the layers of a model, whatever it calls them: its longest list of modules.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> len(layers_of(GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=8, n_layer=3, n_head=2))))
        3
    """
    lists = [module for module in model.get_decoder().modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len)


@contextmanager
def evaluating(objective: Objective) -> Iterator[None]:
    """Evaluate `objective.model` without side effects on its training.

    Within, the model is in evaluation mode, its FSDP parameters are gathered, and torch.compile is off. Random number
    generators are restored at the end. Parameters are gathered once because each forward pass of a sharded layer waits
    for the other processes, which may have fewer batches. Compiled graphs are left to training because evaluation has
    more shapes than the compiler keeps graphs for.

    Example:
        >>> from fgpt_hf import FGPTConfig, FGPTForCausalLM
        >>> from fgpt_hf.losses.objectives import LanguageModelObjective
        >>> model = FGPTForCausalLM(FGPTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
        >>> objective = LanguageModelObjective(model.train())
        >>> with evaluating(objective):
        ...     model.training
        False
        >>> model.training
        True
    """
    with (
        restored_random_state(),
        torch.compiler.set_stance("force_eager"),
        _gathered(objective),
        evaluation_mode(objective.model),
    ):
        yield


def restored_random_state() -> AbstractContextManager[None]:
    """Return a context at whose end torch's random number generators are as they were, of the host and the device."""
    devices = [torch.accelerator.current_device_index()] if torch.accelerator.is_available() else []
    return torch.random.fork_rng(devices)


@contextmanager
def _gathered(objective: Objective) -> Iterator[None]:
    """Keep the parameters of a sharded objective whole."""
    objective.gather()
    layers = [module for module in objective.model.modules() if isinstance(module, FSDPModule)]
    for layer in layers:
        layer.set_reshard_after_forward(False, recurse=False)
        layer.unshard()
    try:
        yield
    finally:
        for layer in layers:
            layer.set_reshard_after_forward(True, recurse=False)
            layer.reshard()


def sync_gradients(forward: nn.Module, accelerator: Accelerator, last: bool) -> AbstractContextManager[None]:
    """Return a context that exchanges gradients among processes after the `last` micro-batch of a step only."""
    if isinstance(forward, FSDPModule):
        forward.set_requires_gradient_sync(last)
    return nullcontext() if last else accelerator.no_sync(forward)


def all_reduce_sum(accelerator: Accelerator, *values: float) -> list[float]:
    """Sum each value over all processes, in float64."""
    if accelerator.num_processes == 1:
        return list(values)
    total = accelerator.reduce(torch.tensor(values, dtype=torch.float64, device=accelerator.device))
    return [float(value) for value in total.tolist()]
