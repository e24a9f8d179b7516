"""`fgpt estimate`."""

from collections.abc import Sequence

from fgpt_hf.runtime.plan import estimate_command


def main(arguments: Sequence[str]) -> None:
    """Print what a run will take of memory, time and money."""
    print(estimate_command(arguments))
