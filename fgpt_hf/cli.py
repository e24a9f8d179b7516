"""`fgpt …`: what one does with a model or a run that is there."""

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from fgpt_hf.report import summary
from fgpt_hf.runs import command_line


def main() -> None:
    command_line(run)


def run(arguments: Sequence[str]) -> None:
    parser = ArgumentParser(prog="fgpt", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    report = commands.add_parser("report", help="losses and samples of a run: fgpt report runs/quickstart/base")
    report.add_argument("run", type=Path)
    report.set_defaults(function=lambda options: print(summary(options.run)))
    options = parser.parse_args(arguments)
    options.function(options)
