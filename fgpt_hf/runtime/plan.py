"""What a run will take, said before its first step; the micro-batch that it leaves open; `fgpt estimate`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache
from torch import Tensor

from fgpt_hf.config.parser import parse_run
from fgpt_hf.config.presets import PRESETS
from fgpt_hf.config.runs import BaseRun, PreferenceRun, Run, option
from fgpt_hf.errors import UserError
from fgpt_hf.model.configuration_fgpt import FGPTConfig
from fgpt_hf.model.lora import adapter_parameters
from fgpt_hf.runtime.estimate import (
    USABLE_SHARE,
    flops_per_token,
    largest_micro_batch,
    memory,
    network,
    parameters,
    remedies,
    rows_on_device,
)
from fgpt_hf.runtime.hardware import GPUS, Machine, known_machine, this_machine

PARTS = ("weights", "gradients", "optimizer", "activations", "loss", "working")
LIKELY_MFU = 0.4  # between the original FGPT's 0.24 on a GH200 and nanochat's 0.54 on H100s


@dataclass(kw_only=True)
class Estimation(BaseRun):
    """What `fgpt estimate` is asked: a run, and where it would run."""

    device: str | None = option(None, f"{', '.join(GPUS)} (default: this machine, and a table of those)")
    num_processes: int = option(1, "how many such devices")
    mfu: float = option(
        LIKELY_MFU, "share of the devices' peak that is reached: the original FGPT's 0.24, nanochat's 0.54"
    )
    price_per_hour: float | None = option(None, "of one device, in any currency, for the cost; needs --device")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mfu > 1:
            raise UserError(f"mfu={self.mfu} must be a share of the peak, such as {LIKELY_MFU}")
        if self.price_per_hour is not None and self.device is None:
            raise UserError(f"price_per_hour needs --device, since each has its own price: {', '.join(GPUS)}")


def estimate_command(arguments: Sequence[str]) -> str:
    """What `fgpt estimate` says to these flags.

    Raises:
        UserError: an unknown device or preset, or a flag that does not work.
    """
    presets = {name: Estimation(**asdict(preset)) for name, preset in PRESETS.items()}
    run = parse_run(Estimation, presets, arguments)
    config, processes = network(run), run.num_processes
    if run.device:
        machine = known_machine(run.device, processes)
    else:
        here = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        machine = this_machine(here, processes)
    lines = [*_needs(run, config, machine), "", f"{'':<12}micro-batch  time at {run.mfu:.0%} of the peak"]
    for name in [run.device] if run.device else GPUS:
        lines.append(f"{name:<12}{_on_device(run, config, known_machine(name, processes))}")
    return "\n".join(lines)


def choose_micro_batch(run: Run, config: FGPTConfig, machine: Machine, say: Callable[[str], None]) -> None:
    """Say what a run takes, and choose its micro-batch where it has left that open, with the rows of a step unchanged.

    Raises:
        UserError: weights, gradients and optimizer are more than a device has, or not even one row fits beside them;
            the rows of a step do not divide among the processes.
    """
    if run.auto_find_batch_size:
        rows = largest_micro_batch(run, config, machine)
        if rows is None:
            raise UserError(_refusal(run, config, machine))
        run.divide_step(rows_on_device(run, machine), rows)
    for line in _needs(run, config, machine):
        say(line)
    if memory(run, config, machine, 1, run.gradient_accumulation_steps).fixed > machine.memory_bytes:
        raise UserError(_refusal(run, config, machine))


def _needs(run: Run, config: FGPTConfig, machine: Machine) -> Iterator[str]:
    """Parameters, tokens, arithmetic and memory, a line each."""
    counts, tokens, flops = parameters(config), _tokens(run, config, machine), flops_per_token(run, config)
    most = "at most " if isinstance(run, PreferenceRun) else ""  # pairs are only as long as they are
    yield (
        f"{counts.total:,} parameters; {run.max_steps:,} steps of {most}{tokens // run.max_steps:,} tokens are "
        f"{most}{tokens:,}, {tokens / counts.total:.3g} for each parameter"
    )
    if adapter := adapter_parameters(run, config):
        yield f"{adapter:,} parameters more are an adapter's, and they alone are trained"
    passes = "6 N, 4 of what is frozen" if adapter else "6 N"
    in_all = f"{most}{flops * tokens:.3g} FLOPs in all"
    yield f"{flops / 1e9:.3g} GFLOPs a token ({passes} + 12 layers x width x length), {in_all}"
    largest = largest_micro_batch(run, config, machine)
    rows = largest or 1 if run.auto_find_batch_size else run.per_device_train_batch_size
    need = memory(run, config, machine, rows, rows_on_device(run, machine) // rows)
    parts = ", ".join(f"{part} {_gigabytes(getattr(need, part))}" for part in PARTS)
    yield f"about {_gigabytes(need.total)} on each device with micro-batches of {rows} rows: {parts}"
    has = f"{machine.name} has {_gigabytes(machine.memory_bytes)}"
    if largest is None:
        yield f"{has}: {_refusal(run, config, machine)}"
    elif need.total > USABLE_SHARE * machine.memory_bytes:
        yield f"{has}, where {largest} rows would fit: --per_device_train_batch_size auto takes as many"
    else:
        yield f"{has}, where up to {largest} rows fit"


def _on_device(run: Estimation, config: FGPTConfig, machine: Machine) -> str:
    """The micro-batch, time and cost of the run on GPUs of the table."""
    rows = largest_micro_batch(run, config, machine)
    if rows is None:
        return "does not fit"
    assert machine.peak_flops is not None  # the table says it
    flops = flops_per_token(run, config) * _tokens(run, config, machine)
    hours = flops / (machine.peak_flops * machine.processes * run.mfu) / 3600
    cost = f", costs {hours * machine.processes * run.price_per_hour:,.2f}" if run.price_per_hour else ""
    return f"{rows:>5} rows   {_duration(hours)}{cost}"


def _refusal(run: Run, config: FGPTConfig, machine: Machine) -> str:
    need = memory(run, config, machine, rows=1, micro_batches=2)
    return (
        f"preset {run.preset} takes {_gigabytes(need.fixed)} for weights, gradients and optimizer and "
        f"{_gigabytes(need.total)} with a micro-batch of one row, more than the {_gigabytes(machine.memory_bytes)} of "
        f"{machine.name}. What would fit: {'; or '.join(remedies(run, config, machine)) or 'a larger device'}"
    )


def _tokens(run: Run, config: FGPTConfig, machine: Machine) -> int:
    """The tokens of the whole run, on all devices, with rows of the greatest length."""
    rows = run.max_steps * run.rows_of_step(machine.processes)
    return rows * run.sequences * run.length(config.max_position_embeddings)


def _gigabytes(number: int) -> str:
    return f"{number / 1e9:.3g} GB"


def _duration(hours: float) -> str:
    if hours < 1:
        return f"{hours * 60:.0f} minutes" if hours * 60 >= 1 else "under a minute"
    return f"{hours:.1f} hours" if hours < 48 else f"{hours / 24:.1f} days"


def split_on_oom(
    micro_batches: Sequence[Mapping[str, Tensor]], run: Run, accelerator: Accelerator
) -> list[Mapping[str, Tensor]]:
    """The same rows in halves, or in thirds where the number is odd and so on; `run` has it so from here on.

    Raises:
        UserError: the micro-batches have one row already; or there are other processes, which wait for the gradients
            of this one and cannot be told.
    """
    rows = run.per_device_train_batch_size
    if rows == 1:
        raise UserError("out of memory with a micro-batch of one row: try --gradient_checkpointing or --fsdp")
    parts = next(number for number in range(2, rows + 1) if rows % number == 0)
    if accelerator.num_processes > 1:
        raise UserError(
            f"out of memory with micro-batches of {rows} rows: try --per_device_train_batch_size {rows // parts} "
            f"--gradient_accumulation_steps {parts * run.gradient_accumulation_steps}"
        )
    clear_device_cache(garbage_collection=True)
    run.divide_step(rows * run.gradient_accumulation_steps, rows // parts)
    accelerator.print(
        f"out of memory with micro-batches of {rows} rows: from here on they have {run.per_device_train_batch_size}, "
        f"{run.gradient_accumulation_steps} a step, so that the step stays what it was"
    )
    return [part for batch in micro_batches for part in _split_batch(batch, rows // parts)]


def _split_batch(batch: Mapping[str, Tensor], rows: int) -> list[dict[str, Tensor]]:
    pieces = zip(*(tensor.split(rows) for tensor in batch.values()), strict=True)
    return [dict(zip(batch, piece, strict=True)) for piece in pieces]
