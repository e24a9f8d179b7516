"""The fields of a run as flags: `--config` and presets under them, and plain answers to what does not work."""

import difflib
from argparse import Action, ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from transformers.hf_argparser import HfArgumentParser, string_to_bool

from fgpt_hf.config.runs import Run, TextSource
from fgpt_hf.errors import UserError

SomeRun = TypeVar("SomeRun", bound=Run)
Options = TypeVar("Options", bound=TextSource)


def parse_run(kind: type[SomeRun], presets: Mapping[str, SomeRun], arguments: Sequence[str]) -> SomeRun:
    """The run that a command line describes: a preset, changed by `--config FILE.yaml`, changed by the flags.

    Raises:
        UserError: one line that says what was given and what would work.
    """
    first = _Parser(add_help=False)
    first.add_argument("--preset", default=kind.preset)
    first.add_argument("--config", type=Path, help="a YAML file of these names, such as another run's run.yaml")
    config = first.parse_known_args(arguments)[0].config
    arguments = [*(_flags_of(config) if config else ()), *arguments]  # of two equal flags the later one counts
    preset = first.parse_known_args(arguments)[0].preset
    if preset not in presets:
        raise UserError(f"unknown preset {preset!r}: the presets are {', '.join(presets)}")

    parser = _Parser(kind, parents=[first], conflict_handler="resolve")
    rows = parser._option_string_actions["--per_device_train_batch_size"]
    parser.add_argument("--per_device_train_batch_size", action=_RowsOrAuto, type=_rows_or_auto, help=rows.help)
    parser.set_defaults(**asdict(presets[preset]))
    run, _, unknown = parser.parse_args_into_dataclasses(
        arguments, look_for_args_file=False, return_remaining_strings=True
    )
    if unknown:
        raise UserError(_unknown_flag(unknown[0], [field.name for field in fields(kind)]))
    return run


def parse_options(kind: type[Options], arguments: Sequence[str]) -> Options:
    """Return the options that a command line gives, as this data class, with its defaults.

    Raises:
        UserError: A flag or its value does not work; one line says what was given and what would work.
    """
    options, unknown = _Parser(kind).parse_args_into_dataclasses(
        arguments, look_for_args_file=False, return_remaining_strings=True
    )
    if unknown:
        raise UserError(_unknown_flag(unknown[0], [field.name for field in fields(kind)]))
    return options


class _Parser(HfArgumentParser):
    """Takes `--flag` for `--flag true`, no abbreviations, and raises what argparse would print under its usage."""

    def __init__(self, kind: Any = None, **options: Any) -> None:
        super().__init__(kind, allow_abbrev=False, **options)
        for action in self._actions:
            if action.type is string_to_bool:
                action.nargs, action.const = "?", True

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


class _RowsOrAuto(Action):
    """A number of rows replaces the preset's; `auto` leaves it, since it says what a step is, and has it divided."""

    def __call__(self, parser: ArgumentParser, namespace: Namespace, value: Any, option: str | None = None) -> None:
        namespace.auto_find_batch_size = value is None
        if value is not None:
            namespace.per_device_train_batch_size = value


def _rows_or_auto(text: str) -> int | None:
    try:
        return None if text == "auto" else int(text)
    except ValueError as error:
        raise ArgumentTypeError(f"{text!r} is neither a number of rows nor auto") from error


def _flags_of(config: Path) -> list[str]:
    if not config.is_file():
        raise UserError(f"--config {config}: there is no such file")
    try:
        values = yaml.safe_load(config.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"--config {config} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"--config {config} must hold lines of 'name: value'")
    return [f"--{name}={value}" for name, value in values.items() if value is not None]


def _unknown_flag(flag: str, names: Sequence[str]) -> str:
    name = flag.split("=")[0].lstrip("-").replace("-", "_")
    close = difflib.get_close_matches(name, names, n=1)
    return f"unknown argument {flag!r}: {f'did you mean --{close[0]}?' if close else '--help lists all of them'}"
