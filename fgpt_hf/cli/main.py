"""`fgpt …`: all commands in one table. What a command needs is imported when it runs."""

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperArgument
from typer.main import get_command

import fgpt_hf
from fgpt_hf.cli.ablate import ablate
from fgpt_hf.cli.chat import chat
from fgpt_hf.cli.convert import convert
from fgpt_hf.cli.entry_point import command_line, program_name
from fgpt_hf.cli.evaluate import evaluate
from fgpt_hf.cli.export import export
from fgpt_hf.cli.publish import publish
from fgpt_hf.cli.report import report
from fgpt_hf.errors import UserError


class RunCommand(NamedTuple):
    """A command whose options are the fields of a run: its module has `main(arguments)`, which parses them."""

    module: str
    help: str
    example: str


COMMANDS: Mapping[str, RunCommand | Callable[..., None]] = {
    "train-base": RunCommand(
        "fgpt_hf.cli.train_base",
        "Train a base model on documents.",
        "fgpt train-base --preset fgpt-124m --dataset_name documents.jsonl",
    ),
    "train-instruct": RunCommand(
        "fgpt_hf.cli.train_instruct",
        "Tune a model on conversations.",
        "fgpt train-instruct --model_name_or_path runs/quickstart/base --dataset_name pydocs-chat",
    ),
    "train-preference": RunCommand(
        "fgpt_hf.cli.train_preference",
        "Tune a model on preferences (DPO, IPO, SimPO).",
        "fgpt train-preference --model_name_or_path runs/quickstart/instruct --dataset_name pydocs-preference",
    ),
    "chat": chat,
    "evaluate": evaluate,
    "lm-eval": RunCommand(
        "fgpt_hf.cli.lm_eval",
        "Run tasks of lm-evaluation-harness, faster.",
        "fgpt lm-eval --model_args pretrained=runs/quickstart/base --tasks hellaswag --num_fewshot 5",
    ),
    "prepare": RunCommand(
        "fgpt_hf.cli.prepare",
        "Tokenize and pack documents once, for many runs.",
        "fgpt prepare --dataset_name fineweb-edu --output_dir data/fineweb-edu",
    ),
    "tokenizer": RunCommand(
        "fgpt_hf.cli.tokenizer",
        "Train a tokenizer on your documents.",
        "fgpt tokenizer --dataset_name my_texts/ --vocab_size 16384 my_tokenizer",
    ),
    "estimate": RunCommand(
        "fgpt_hf.cli.estimate",
        "Estimate a run's memory, time and cost.",
        "fgpt estimate --preset fgpt-712m --device h100",
    ),
    "report": report,
    "ablate": ablate,
    "convert": convert,
    "export": export,
    "publish": publish,
}
METAVARS: Mapping[type, str] = {int: "N", float: "X", str: "TEXT", Path: "FILE"}
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}  # options of a run


def main() -> None:
    """Run `fgpt` with the arguments of the process."""
    command_line(run)


def run(arguments: Sequence[str]) -> None:
    """Run the command that the first argument names with the others.

    Raises:
        UserError: an unknown command or option, or a value that does not work.

    Example:
        >>> run(["--version"])  # doctest: +ELLIPSIS
        fgpt ...
        >>> run(["chatt"])
        Traceback (most recent call last):
            ...
        fgpt_hf.errors.UserError: No such command 'chatt'. Did you mean 'chat'? (fgpt --help explains)
    """
    try:
        status = _parser()(list(arguments), prog_name="fgpt", standalone_mode=False)
    except typer.TyperException as error:
        raise UserError(_one_line(error)) from error
    if status:
        sys.exit(status)


def _parser() -> Callable[..., int | None]:
    """Build the parser of all commands; it is called with arguments, and returns an exit code."""
    app = typer.Typer(
        rich_markup_mode=None,
        add_completion=False,
        context_settings={
            "max_content_width": 120,
            "token_normalize_func": lambda name: name.replace("-", "_"),  # --dry-run is --dry_run
        },
    )
    app.callback(invoke_without_command=True)(_without_command)
    for name, command in COMMANDS.items():
        if isinstance(command, RunCommand):
            pass_on = _pass_arguments_to(name, command)
            app.command(name, help=command.help, context_settings={**PASSED_ON, "help_option_names": []})(pass_on)
        else:
            app.command(name, context_settings=PASSED_ON if command is ablate else None)(command)
    parser = get_command(app)
    for command in getattr(parser, "commands", {}).values():
        for parameter in command.params:
            _name_kind_of_value(parameter)
    return parser


def _name_kind_of_value(parameter: Any) -> None:
    """Let `--help` say what kind of value a parameter takes as it does for the options of a run, not as Python does."""
    if isinstance(parameter, TyperArgument):
        parameter.display_type_rich = lambda ctx: None  # type: ignore[method-assign]  # its name says that
    elif parameter.metavar is None:
        parameter.metavar = METAVARS.get(parameter.type_descriptor.annotation)


def _without_command(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    """Train a GPT-2-architecture model from raw documents, measure it, chat with it and publish it."""
    if version:
        print(f"fgpt {fgpt_hf.__version__}")
        raise typer.Exit()
    if context.invoked_subcommand is None:
        print(context.get_help())


def _pass_arguments_to(name: str, command: RunCommand) -> Callable[[typer.Context], None]:
    """Return a command that hands all of its arguments to the module's `main`, whose parser also has the help."""

    def pass_on(context: typer.Context) -> None:
        if {"-h", "--help"} & set(context.args):
            print(f"{command.help}\n\nExample: {command.example}\n")
        with program_name(f"fgpt {name}"):
            import_module(command.module).main(context.args)

    return pass_on


def _one_line(error: typer.TyperException) -> str:
    """Return what is wrong, the option that was probably meant, and the help that lists all of them."""
    message = error.format_message().removesuffix(".").replace("Value error, ", "")
    if errors := getattr(error.__cause__, "errors", None):  # of pydantic, which checks values for typer
        message = message.replace("Input", repr(errors()[0]["input"]))
    if close := getattr(error, "possibilities", None):
        message = f"{error.message}. Did you mean {close[0]}?"
    context = getattr(error, "ctx", None)
    return f"{message} ({context.command_path if context else 'fgpt'} --help explains)"


if __name__ == "__main__":
    main()
