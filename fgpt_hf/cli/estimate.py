"""`fgpt estimate`."""

from collections.abc import Sequence

from fgpt_hf.hub.jobs import jobs_table
from fgpt_hf.runtime.estimation import describe_estimation, parse_estimation


def main(arguments: Sequence[str]) -> None:
    """Print what a run will take of memory, time and money."""
    run = parse_estimation(arguments)
    print(jobs_table(run) if run.jobs else describe_estimation(run))
