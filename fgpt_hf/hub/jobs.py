"""Estimate on which machines of the Hub's Jobs a run finishes, when, and at what cost."""

import math
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from huggingface_hub import HfApi, JobHardwareInfo

from fgpt_hf.config.options import described_fields, flag_value
from fgpt_hf.config.presets import PRESETS
from fgpt_hf.config.runs import BaseRun
from fgpt_hf.errors import UserError
from fgpt_hf.hub.upload import plain_errors
from fgpt_hf.retries import retry
from fgpt_hf.runtime.duration import duration, likely_seconds
from fgpt_hf.runtime.estimation import Estimation, network_of, with_estimated_steps
from fgpt_hf.runtime.hardware import GPUS, known_machine
from fgpt_hf.runtime.workload import Workload

HOURS_OF = {"second": 1 / 3600, "minute": 1 / 60, "hour": 1.0, "day": 24.0}
STARTING_SECONDS = 900  # to install, to read the data and to publish the model
SAFETY = 1.25  # of the timeout over the time that is likely


@dataclass(frozen=True)
class Flavor:
    """A machine of the Hub's Jobs.

    Attributes:
        name: what `hf jobs uv run --flavor` calls it.
        accelerator: the manufacturer's name of its accelerator.
        device: the name that `runtime.hardware.GPUS` has for that, or None if it has none.
        count: the number of its accelerators.
        price: dollars per hour of the whole machine.
    """

    name: str
    accelerator: str
    device: str | None
    count: int
    price: float


@dataclass(frozen=True)
class Offer:
    """What a run takes on one machine.

    Attributes:
        rows: the micro-batch on each device.
        tokens: those that the run trains on.
        seconds: the likely time of its steps.
    """

    flavor: Flavor
    rows: int
    tokens: int
    seconds: float

    @property
    def cost(self) -> float:
        """Dollars for the steps, and for the start and the end of the job."""
        return (self.seconds + STARTING_SECONDS) / 3600 * self.flavor.price

    @property
    def timeout(self) -> str:
        """The value for `--timeout`, in whole hours; without one, a job ends after 30 minutes."""
        return f"{math.ceil(SAFETY * (self.seconds + STARTING_SECONDS) / 3600)}h"


def jobs_table(run: Estimation) -> str:
    """Return a table of the Hub's machines for a run, with the cheapest and the fastest one below it.

    Raises:
        UserError: the Hub cannot be reached, or its answer cannot be read; no machine is large enough.
    """
    flavors = gpu_flavors()
    offers, left_out = [], []
    for flavor in flavors:
        offer = _offer(run, flavor)
        if isinstance(offer, Offer):
            offers.append(offer)
        else:
            left_out.append(f"{flavor.name:<16}{offer}")
    if not offers:
        raise UserError(f"preset {run.preset} fits none of the {len(flavors)} machines of the Hub's Jobs with a GPU")
    offers.sort(key=lambda offer: offer.cost)
    fastest = min(offers, key=lambda offer: offer.seconds)
    time = f"time at {run.mfu:.0%}"
    lines = [f"{'flavor':<16}{'micro-batch':<13}{'tokens':>8}  {time:<13}{'$/hour':>8}{'cost':>10}  timeout"]
    lines += [_line(offer) for offer in offers]
    return "\n".join([*lines, *left_out, "", *_commands(run, offers[0], fastest)])


def gpu_flavors() -> list[Flavor]:
    """Return the machines of the Hub's Jobs that have accelerators, with their prices now.

    Raises:
        UserError: the Hub cannot be reached, or its answer is not what this version of huggingface_hub reads.
    """
    with plain_errors("the prices of the Hub's Jobs", "try again later, or give --device and --price_per_hour"):
        try:
            machines = retry("the prices of the Hub's Jobs", HfApi().list_jobs_hardware)
            return [_flavor(machine) for machine in machines if machine.accelerator]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                "the prices of the Hub's Jobs cannot be read: the answer is not what this version of huggingface_hub "
                f"expects ({type(error).__name__}: {error}); see https://huggingface.co/pricing, or give --device and "
                "--price_per_hour"
            ) from error


def _flavor(machine: JobHardwareInfo) -> Flavor:
    accelerator = machine.accelerator
    assert accelerator is not None  # the caller leaves out those without
    count, price = int(accelerator.quantity), float(machine.unit_cost_usd) / HOURS_OF[machine.unit_label]
    if count < 1 or not 0 <= price < math.inf:
        raise ValueError(f"{machine.name} has {count} accelerators for {price} dollars an hour")
    gigabytes = float(accelerator.vram.split()[0]) / count
    return Flavor(machine.name, accelerator.model, _device(accelerator.model, gigabytes), count, price)


def _device(model: str, gigabytes: float) -> str | None:
    """Return the name in the table of GPUs for an accelerator, whose memory tells those of one model apart.

    Example:
        >>> _device("A100", 80.0), _device("Nvidia H200", 141.0), _device("RTX PRO 6000", 96.0), _device("T4", 16.0)
        ('a100-80gb', 'h200', 'rtx-pro-6000', None)
    """
    name = re.sub(r"\W+", "-", model.lower()).removeprefix("nvidia-")
    alike = [known for known in GPUS if known == name or re.fullmatch(rf"{name}-\d+gb", known)]
    return min(alike, key=lambda known: abs(GPUS[known].gigabytes - gigabytes), default=None)


def _offer(run: Estimation, flavor: Flavor) -> Offer | str:
    """Return what the run takes on a machine, or in words why it is left out."""
    if flavor.device is None:
        return f"has {flavor.accelerator}, which the table of GPUs lacks"
    any_rows = replace(run, auto_find_batch_size=True)  # so that a step has as many rows on any number of devices
    workload = Workload(any_rows, network_of(run), known_machine(flavor.device, flavor.count))
    try:
        rows = workload.largest_micro_batch()
    except UserError as error:
        return str(error)
    if rows is None:
        return "does not fit"
    timed = with_estimated_steps(workload, run.mfu)
    tokens = timed.run.max_steps * timed.tokens_per_step
    return Offer(flavor, rows, tokens, likely_seconds(timed, tokens, run.mfu))


def _line(offer: Offer) -> str:
    flavor = offer.flavor
    rows = f"{offer.rows} row{'s' if offer.rows > 1 else ''}"
    return (
        f"{flavor.name:<16}{rows:<13}{f'{offer.tokens / 1e9:.3g}B':>8}  {duration(offer.seconds):<13}"
        f"{flavor.price:>8.2f}{offer.cost:>10,.2f}  {offer.timeout}"
    )


def _commands(run: Estimation, cheapest: Offer, fastest: Offer) -> Iterator[str]:
    """Yield the best offers, each as the command that starts it."""
    best: Sequence[tuple[str, Offer]] = [("cheapest", cheapest), ("fastest", fastest)]
    for word, offer in best[: 1 if cheapest == fastest else 2]:
        flavor = f"--flavor {offer.flavor.name} --timeout {offer.timeout} --secrets HF_TOKEN"
        yield f"{word}: {duration(offer.seconds)}, ${offer.cost:,.2f}"
        yield f"    hf jobs uv run {flavor} recipes/hf_job.py {' '.join(_flags(run))}"


def _flags(run: Estimation) -> Iterator[str]:
    """Yield the flags that describe the run to its training command: the preset, and what differs from it."""
    yield f"--preset {run.preset}"
    own = {"preset", "hub_model_id", "push_to_hub", "auto_find_batch_size"}  # the script sets the last two itself
    for field, _ in described_fields(BaseRun):
        value = getattr(run, field.name)
        if field.name not in own and value != getattr(PRESETS[run.preset], field.name):
            yield f"--{field.name} {shlex.quote(flag_value(value))}"
    yield f"--hub_model_id {run.hub_model_id or 'USER/NAME'}"
