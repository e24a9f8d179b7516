"""`fgpt …`: what one does with a model or a run that is there."""

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from fgpt_hf.preparation import prepare_documents
from fgpt_hf.report import summary
from fgpt_hf.runs import Preparation, command_line, flags, from_flags


def main() -> None:
    command_line(run)


def run(arguments: Sequence[str]) -> None:
    parser = ArgumentParser(prog="fgpt", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    report = commands.add_parser("report", help="losses and samples of a run: fgpt report runs/quickstart/base")
    report.add_argument("run", type=Path)
    report.set_defaults(function=lambda options: print(summary(options.run)))
    prepare = commands.add_parser(
        "prepare",
        parents=[flags(Preparation)],
        help="tokenise documents once: fgpt prepare --dataset_name fineweb-edu --output_dir data/fineweb-edu-10bt",
    )
    prepare.set_defaults(function=lambda options: print(prepare_documents(from_flags(Preparation, options))))
    options = parser.parse_args(arguments)
    options.function(options)
