"""Profile some steps of a run: where the time of host and device goes."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from fgpt_hf.files import write_atomically
from fgpt_hf.training.run_folder import RunFolder

logger = logging.getLogger(__name__)

STEPS_BEFORE = 2  # which compile and allocate
FOLDER, TRACE, TABLE = "profile", "trace.json", "operations.txt"
ROWS = 40  # of the table


@contextmanager
def profiled(steps: int, folder: RunFolder) -> Iterator[Callable[[], None]]:
    """Yield a function to call after each step; `steps` of them, after the first two, are profiled by torch.

    The main process writes `profile/trace.json`, which Perfetto and Chrome show, and `profile/operations.txt`, the
    operations that take longest.

    Args:
        steps: how many; 0 profiles nothing.
        folder: of the run.
    """
    if not steps or not folder.is_writer:
        yield lambda: None
        return

    def write(profiler: profile) -> None:
        path = folder.path / FOLDER
        path.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(path / TRACE))
        order = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=order, row_limit=ROWS, max_name_column_width=80)
        write_atomically(path / TABLE, table)
        logger.info("profile of %d steps: %s (for ui.perfetto.dev) and %s", steps, path / TRACE, path / TABLE)

    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * torch.cuda.is_available()]
    plan = schedule(wait=STEPS_BEFORE - 1, warmup=1, active=steps, repeat=1)
    taken = 0
    with profile(activities=activities, schedule=plan, on_trace_ready=write, profile_memory=True) as profiler:

        def next_step() -> None:
            nonlocal taken
            taken += 1
            profiler.step()

        yield next_step
    if taken < STEPS_BEFORE + steps:
        logger.warning(
            "profile=%d needs %d steps, and the run took %d: it shows fewer steps, or none",
            *(steps, STEPS_BEFORE + steps, taken),
        )
