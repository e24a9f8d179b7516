"""Estimate what a run takes of memory, time and money, on this machine or on GPUs by name: `fgpt estimate`."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import torch

from fgpt_hf.config.options import option
from fgpt_hf.config.parser import parse_run
from fgpt_hf.config.presets import PRESETS
from fgpt_hf.config.runs import BaseRun
from fgpt_hf.errors import UserError
from fgpt_hf.model.io import load_config, model_source
from fgpt_hf.model.shapes import NetworkShape, shape_of
from fgpt_hf.runtime.duration import LIKELY_MFU, duration, likely_seconds
from fgpt_hf.runtime.hardware import GPUS, known_machine, this_machine
from fgpt_hf.runtime.network import Network, network_config
from fgpt_hf.runtime.plan import describe_needs, first_plan
from fgpt_hf.runtime.workload import Workload


@dataclass(frozen=True, kw_only=True)
class Estimation(BaseRun):
    """A run, and the machine for which its memory, time and cost are estimated."""

    device: str | None = option(None, f"Device: {', '.join(GPUS)}.", unset="this machine, then a table of all of these")
    num_processes: int = option(1, "Number of devices.")
    jobs: bool = option(
        False, "Show instead what the run takes and costs on each GPU machine of the Hub's Jobs, at today's prices."
    )
    mfu: float = option(
        LIKELY_MFU,
        "Model FLOPs utilization: the fraction of the devices' peak that is reached. The original FGPT reached 0.24, "
        "nanochat 0.54.",
        maximum=1,
    )
    price_per_hour: float | None = option(
        None, "Price of one device per hour, in any currency; needs --device.", unset="no cost is estimated"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.jobs and self.price_per_hour is not None:
            raise UserError("jobs has the prices from the Hub: leave out --price_per_hour")
        if self.price_per_hour is not None and self.device is None:
            raise UserError(f"price_per_hour needs --device, since each has its own price: {', '.join(GPUS)}")
        if self.jobs and (self.device is not None or self.num_processes > 1):
            raise UserError("jobs shows machines with their own devices: leave out --device and --num_processes")


def parse_estimation(arguments: Sequence[str]) -> Estimation:
    """Return what the flags of `fgpt estimate` say; raise UserError if one does not work."""
    presets = {name: Estimation(**asdict(preset)) for name, preset in PRESETS.items()}
    return parse_run(Estimation, presets, arguments)


def describe_estimation(run: Estimation) -> str:
    """Return what a run takes of memory, time and money, on its device or on each that is known.

    Raises:
        UserError: the device is unknown.

    Example:
        >>> print(describe_estimation(parse_estimation(["--preset=fgpt-124m", "--device=h100"])).splitlines()[-1])
        h100          128 rows   1.5 hours
    """
    if run.device:
        machine = known_machine(run.device, run.num_processes)
    else:
        here = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        machine = this_machine(here, run.num_processes)
    workload = with_estimated_steps(Workload(run, network_of(run), machine), run.mfu)
    lines = [*_unknown(workload.shape), *describe_needs(workload, first_plan(workload), run.mfu)]
    lines += ["", f"{'':<12}micro-batch  time at {run.mfu:.0%} of the peak"]
    for name in [run.device] if run.device else GPUS:
        on_gpus = replace(workload, machine=known_machine(name, run.num_processes))
        lines.append(f"{name:<12}{_on_gpus(on_gpus, run.mfu, run.price_per_hour)}")
    return "\n".join(lines)


def network_of(run: BaseRun) -> Network:
    """Return the network that a run trains: its own shape, or that of the model that it starts from."""
    if run.start_model is None:
        return network_config(run)
    return shape_of(load_config(model_source(run.start_model), trust_remote_code=run.trust_remote_code))


def _unknown(shape: NetworkShape) -> Iterator[str]:
    """Yield a line for each thing about a network that the estimate does not know."""
    if not shape.is_exact:
        yield (
            f"a {shape.model_type}: parameters and operations are those of its configuration; activations are those of "
            f"a Transformer of its shape with {shape.norm} and a {shape.mlp} MLP, and may be others"
        )
    if any("expert" in name for name in shape.parameters):
        yield "experts: counted as if each token went through all of them, so time and operations are upper bounds"


def with_estimated_steps(workload: Workload, mfu: float) -> Workload:
    """Return the workload with the steps that its run's time is likely to have room for, instead of that time."""
    minutes = workload.run.max_minutes
    if minutes is None:
        return workload
    step_seconds = likely_seconds(workload, workload.tokens_per_step, mfu)
    steps = max(1, int(60 * minutes / step_seconds))
    return replace(workload, run=replace(workload.run, max_steps=steps, max_minutes=None))


def _on_gpus(workload: Workload, mfu: float, price_per_hour: float | None) -> str:
    """Describe the micro-batch, time and cost of the run on GPUs of the table."""
    rows = workload.largest_micro_batch()
    if rows is None:
        return "does not fit"
    seconds = likely_seconds(workload, workload.run.max_steps * workload.tokens_per_step, mfu)
    hours = seconds / 3600 * workload.machine.processes
    cost = f", costs {hours * price_per_hour:,.2f}" if price_per_hour else ""
    return f"{rows:>5} rows   {duration(seconds)}{cost}"
