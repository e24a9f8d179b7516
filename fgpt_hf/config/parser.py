"""Parse a command line into a run: a preset, changed by a YAML file, changed by flags."""

import copy
import difflib
import re
from argparse import (
    SUPPRESS,
    Action,
    ArgumentDefaultsHelpFormatter,
    ArgumentParser,
    ArgumentTypeError,
    Namespace,
)
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, get_args, get_type_hints

from transformers.hf_argparser import HfArgumentParser, string_to_bool

from fgpt_hf.config.options import Option, described_fields, flag_value, group_of, group_title
from fgpt_hf.config.runs import Run
from fgpt_hf.errors import UserError
from fgpt_hf.parsing import parse_yaml

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

SomeRun = TypeVar("SomeRun", bound=Run)
SomeOptions = TypeVar("SomeOptions", bound="DataclassInstance")

USAGE = "%(prog)s [--OPTION VALUE ...]"
UNSETTING = "The value none unsets an option that the preset or the file sets."


def parse_run(kind: type[SomeRun], presets: Mapping[str, SomeRun], arguments: Sequence[str]) -> SomeRun:
    """Return the run that a command line describes: a preset, changed by `--config FILE.yaml`, changed by the flags.

    Raises:
        UserError: a flag, value or file does not work; one line says what was given and what would work.

    Example:
        >>> from fgpt_hf.config.presets import PRESETS
        >>> from fgpt_hf.config.runs import BaseRun
        >>> parse_run(BaseRun, PRESETS, ["--preset", "quickstart", "--max_steps", "7"]).max_steps
        7
    """
    if is_given("max_steps", arguments) and is_given("max_minutes", arguments):
        raise UserError("max_steps and max_minutes exclude each other: give one of them")
    first = _Parser(add_help=False)
    first.add_argument("--preset", default=kind.preset)
    first.add_argument("--config", type=Path)
    config = first.parse_known_args(arguments)[0].config
    arguments = [*(_flags_of(config, kind) if config else ()), *arguments]  # the later one of two equal flags counts
    preset = first.parse_known_args(arguments)[0].preset
    if preset not in presets:
        raise UserError(f"unknown preset {preset!r}: the presets are {', '.join(presets)}")

    parser = _Parser(kind, usage=f"{USAGE} [--config FILE.yaml]", description=f"{_first_paragraph(kind)} {UNSETTING}")
    parser.add_argument("--config", type=Path, help="YAML file of options, such as a run's run.yaml.", default=SUPPRESS)
    parser.set_defaults(**asdict(presets[preset]))
    run: SomeRun = parser.parse(arguments)
    return run if is_given("eval_tasks", arguments) else _without_foreign_tasks(run, presets[preset])


def parse_options(kind: type[SomeOptions], arguments: Sequence[str]) -> SomeOptions:
    """Return the options that a command line gives, as this data class, with its defaults.

    Raises:
        UserError: a flag or its value does not work; one line says what was given and what would work.

    Example:
        >>> from fgpt_hf.config.runs import Preparation
        >>> parse_options(Preparation, ["--dataset_name", "documents.jsonl"]).output_dir
        'runs/prepared'
    """
    positional = [field.name.upper() for field, described in described_fields(kind) if described.positional]
    options: SomeOptions = _Parser(kind, usage=" ".join([USAGE, *positional])).parse(arguments)
    return options


class _HelpFormatter(ArgumentDefaultsHelpFormatter):
    """Show each option once, without the spelling with hyphens, with the kind of its value and its default in words."""

    def _get_default_metavar_for_optional(self, action: Action) -> str:
        if isinstance(action.type, _OrNone):
            return f"{METAVARS.get(action.type.read, 'TEXT')}|none"
        return METAVARS.get(action.type, "TEXT")

    def _format_action_invocation(self, action: Action) -> str:
        named = copy.copy(action)
        named.option_strings = [name for name in action.option_strings if "-" not in name[2:]]
        return super()._format_action_invocation(named if named.option_strings else action)

    def _get_help_string(self, action: Action) -> str | None:
        unset = getattr(action, "unset", None)
        if action.default is None and unset:
            return f"{action.help} (default: {unset})"
        if isinstance(action.default, bool):
            return f"{action.help} (default: {str(action.default).lower()})"
        return super()._get_help_string(action)


class _Parser(HfArgumentParser):
    """Lists options in their groups, takes `--flag` for `--flag true`, no abbreviations, and raises UserError."""

    def __init__(self, kind: Any = None, **settings: Any) -> None:
        super().__init__(kind, allow_abbrev=False, formatter_class=_HelpFormatter, **settings)

    def parse(self, arguments: Sequence[str]) -> Any:
        """Return what the arguments describe, as the parser's data class; UserError for one that it does not know."""
        parsed, *_, unknown = self.parse_args_into_dataclasses(
            arguments, look_for_args_file=False, return_remaining_strings=True
        )
        if unknown:
            raise UserError(_unknown_flag(unknown[0], [field.name for field in fields(parsed)]))
        return parsed

    def _add_dataclass_arguments(self, dtype: Any) -> None:
        """Add the fields that `option` declared, each to its group, of which the command's own is the first."""
        types = get_type_hints(dtype)
        groups: dict[type[Any], Any] = {}
        for field, described in sorted(described_fields(dtype), key=lambda each: group_of(dtype, *each) is not dtype):
            if described.positional:
                self.add_argument(field.name, metavar=field.name.upper(), help=described.help)
                continue
            group = group_of(dtype, field, described)
            if group not in groups:
                groups[group] = self.add_argument_group(group_title(group), _first_paragraph(group))
            add = self._add_special_option if field.name in READ_BY else self._add_option
            added = add(groups[group], field, described, types[field.name])
            added.unset = described.unset
            if issubclass(dtype, Run) and _is_optional(types[field.name]):
                added.type = _OrNone(added.type or str)

    def _add_special_option(self, group: Any, field: Field[Any], described: Option, type_of_field: Any) -> Any:
        """Add an option of `READ_BY`."""
        action, read = READ_BY[field.name]
        names = (f"--{field.name}", f"--{field.name.replace('_', '-')}")
        return group.add_argument(*names, action=action, type=read, default=field.default, help=described.help)

    def _add_option(self, group: Any, field: Field[Any], described: Option, type_of_field: Any) -> Any:
        """Add an option as transformers does for a field of this type."""
        plain: Any = SimpleNamespace(
            name=field.name,
            type=type_of_field,
            default=field.default,
            default_factory=field.default_factory,
            metadata={"help": described.help.replace("%", "%%")},
        )
        self._parse_dataclass_field(group, plain)
        action: Any = self._option_string_actions[f"--{field.name}"]
        action.choices = action.choices or described.choices or None
        if action.type is string_to_bool:
            action.nargs, action.const = "?", True
        if opposite := self._option_string_actions.get(f"--no_{field.name}"):
            opposite.help = SUPPRESS  # `--flag false` says the same
        return action

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


class _OrNone:
    """Reads `none`, which unsets an option that a preset or a file has set, or what its option reads otherwise."""

    def __init__(self, read: Callable[[str], Any]) -> None:
        self.read = read
        self.__name__ = getattr(read, "__name__", "option")  # in argparse's messages

    def __call__(self, text: str) -> Any:
        return None if text == "none" else self.read(text)


def _is_optional(kind: Any) -> bool:
    return type(None) in get_args(kind)


def _first_paragraph(kind: type[Any]) -> str:
    return " ".join((kind.__doc__ or "").split("\n\n")[0].split())


class _RowsOrAuto(Action):
    """Takes a number of rows, or `auto`, which keeps the preset's number as part of the effective batch size."""

    def __call__(self, parser: ArgumentParser, namespace: Namespace, value: Any, option: str | None = None) -> None:
        namespace.auto_find_batch_size = value is None
        if value is not None:
            namespace.per_device_train_batch_size = value


def _rows_or_auto(text: str) -> int | None:
    try:
        return None if text == "auto" else int(text)
    except ValueError as error:
        raise ArgumentTypeError(f"{text!r} is neither a number of rows nor auto") from error


class _StepsNotMinutes(Action):
    """Takes a number of steps, which replaces a number of minutes that came before it, as from a `run.yaml`."""

    def __call__(self, parser: ArgumentParser, namespace: Namespace, value: Any, option: str | None = None) -> None:
        namespace.max_steps, namespace.max_minutes = value, None


def _minutes(text: str) -> float:
    """Return the minutes of a duration, whose unit is s, m, h or d, or minutes where none is given.

    Example:
        >>> _minutes("30"), _minutes("90s"), _minutes("2h")
        (30.0, 1.5, 120.0)
    """
    number, unit = (text[:-1], text[-1]) if text[-1:] in MINUTES_OF else (text, "m")
    try:
        return float(number) * MINUTES_OF[unit]
    except ValueError as error:
        raise ArgumentTypeError(f"{text!r} is not a duration, such as 30, 90s, 2h or 1.5d") from error


MINUTES_OF = {"s": 1 / 60, "m": 1.0, "h": 60.0, "d": 1440.0}
# Options that are read in a way of their own: what sets them, and what reads their text.
READ_BY: Mapping[str, tuple[Any, Callable[[str], Any]]] = {
    "per_device_train_batch_size": (_RowsOrAuto, _rows_or_auto),
    "max_steps": (_StepsNotMinutes, int),
    "max_minutes": ("store", _minutes),
}
# What `--help` shows in the place of a value, by what reads the value.
METAVARS: Mapping[object, str] = {
    **{int: "N", float: "X", Path: "FILE", string_to_bool: "true|false"},
    **{_rows_or_auto: "N|auto", _minutes: "TIME"},
}


def is_given(name: str, arguments: Sequence[str]) -> bool:
    """Return whether the arguments give an option, in either spelling."""
    return any(each.partition("=")[0].replace("-", "_") == f"__{name}" for each in arguments)


def _without_foreign_tasks(run: SomeRun, preset: SomeRun) -> SomeRun:
    """Return the run without the preset's benchmarks if its data are not the preset's, from which they are made."""
    own, given = (_data_sets(each) for each in (preset, run))
    return run if given <= own else replace(run, eval_tasks=None)


def _data_sets(run: Run) -> set[str]:
    """Return the names of a run's datasets, without the limits and repeats of a mixture."""
    return {re.split("[:*]", entry)[0] for entry in getattr(run, "dataset_name", "").split(",")}


def _flags_of(config: Path, kind: type[Run]) -> list[str]:
    if config.is_dir():
        raise UserError(f"--config {config} is a folder: give a file, such as {config / 'run.yaml'}")
    if not config.is_file():
        raise UserError(f"--config {config}: there is no such file")
    try:
        values = parse_yaml(config.read_text(encoding="utf-8"))
    except (UserError, UnicodeDecodeError) as error:
        raise UserError(f"--config {config} cannot be read: {error}") from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise UserError(f"--config {config} must hold lines of 'name: value'")
    types = get_type_hints(kind)
    for name, value in values.items():
        if value is None and name in types and not _is_optional(types[name]):
            raise UserError(f"--config {config}: {name} has no value, and cannot be unset")
        if not _is_single(value):
            raise UserError(f"--config {config}: {name} must be a single value on one line, not {str(value)[:40]!r}")
    return [f"--{name}={flag_value(value)}" for name, value in values.items()]


def _is_single(value: object) -> bool:
    """Return whether a value could be given on a command line."""
    return not isinstance(value, (dict, list, set, bytes)) and "\0" not in str(value)


def _unknown_flag(flag: str, names: Sequence[str]) -> str:
    name = flag.split("=")[0].lstrip("-").replace("-", "_")
    close = difflib.get_close_matches(name, names, n=1)
    return f"unknown argument {flag!r}: {f'did you mean --{close[0]}?' if close else '--help lists all of them'}"
