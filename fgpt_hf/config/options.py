"""Options: the fields of a run, each with its help, its limits and whether a resumed run may change it."""

import math
import re
from collections.abc import Iterator
from dataclasses import Field, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from fgpt_hf.errors import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclass(frozen=True)
class Limits:
    """The numbers that an option accepts: finite ones, and above zero where no `minimum` says otherwise.

    Attributes:
        minimum: the smallest number accepted; None means any number above zero.
        below: the number that all accepted ones are less than.
        maximum: the largest number accepted.

    Example:
        >>> Limits(minimum=0, below=1).check("dropout", 0.1)
        >>> Limits(minimum=0, below=1).check("dropout", 1.5)
        Traceback (most recent call last):
            ...
        fgpt_hf.errors.UserError: dropout=1.5 must be zero or more and below 1
    """

    minimum: float | None = None
    below: float | None = None
    maximum: float | None = None

    def check(self, name: str, value: object) -> None:
        """Raise UserError if `value` is a number that the option called `name` does not accept."""
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return
        if not math.isfinite(value):
            raise UserError(f"{name}={value} must be a finite number")
        if not self._accepts(value):
            raise UserError(f"{name}={value} must be {self}")

    def _accepts(self, value: float) -> bool:
        return (
            (value > 0 if self.minimum is None else value >= self.minimum)
            and (self.below is None or value < self.below)
            and (self.maximum is None or value <= self.maximum)
        )

    def __str__(self) -> str:
        words: dict[float | None, str] = {None: "above zero", 0: "zero or more"}
        lowest = words.get(self.minimum, f"at least {self.minimum}")
        highest = [f"below {self.below}"] * (self.below is not None)
        highest += [f"at most {self.maximum}"] * (self.maximum is not None)
        return " and ".join([lowest, *highest])


@dataclass(frozen=True)
class Option:
    """All that a field says of itself, apart from its type and default.

    Attributes:
        help: a whole sentence for `--help`, which appends the default.
        unset: the words for a default of None.
        limits: the numbers that the option accepts.
        choices: the words that it accepts; any, if there are none here.
        fixed_on_resume: whether a resumed run must have the recorded value, because weights, data or the optimizer's
            state depend on it.
        one_time: whether it is an order for one start, which `run.yaml` does not repeat.
        group: the data class under which `--help` lists the option; None means the first one that declares it.
        positional: whether it is given without its name, as `OUTPUT_DIR`.
    """

    help: str
    unset: str
    limits: Limits
    choices: tuple[str, ...]
    fixed_on_resume: bool
    one_time: bool
    group: type[Any] | None
    positional: bool


def option(
    default: Any,
    help: str,
    *,
    unset: str = "none",
    minimum: float | None = None,
    below: float | None = None,
    maximum: float | None = None,
    choices: tuple[str, ...] = (),
    fixed_on_resume: bool = False,
    one_time: bool = False,
    group: type[Any] | None = None,
    positional: bool = False,
) -> Any:
    """Declare a field of an options class; `Option` and `Limits` explain the arguments.

    A default of `MISSING` makes it required.

    Example:
        >>> @dataclass(frozen=True, kw_only=True)
        ... class Sampling:
        ...     temperature: float = option(0.8, "Divide the logits by this number.", minimum=0)
        >>> Sampling().temperature
        0.8
    """
    limits = Limits(minimum, below, maximum)
    described = Option(help, unset, limits, choices, fixed_on_resume, one_time, group, positional)
    return field(default=default, metadata={Option: described})


def described_fields(kind: "type[DataclassInstance] | DataclassInstance") -> Iterator[tuple[Field[Any], Option]]:
    """Yield the fields of a data class that `option` declared, each with what it says of itself."""
    for each in fields(kind):
        if Option in each.metadata:
            yield each, each.metadata[Option]


def flag_value(value: object) -> str:
    """Return the value of an option as its flag takes it.

    Example:
        >>> flag_value(None), flag_value(True), flag_value(3)
        ('none', 'true', '3')
    """
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def check_limits(options: "DataclassInstance") -> None:
    """Raise UserError for the first field whose value is outside its limits."""
    for each, described in described_fields(options):
        described.limits.check(each.name, getattr(options, each.name))


def group_of(kind: type[Any], field: Field[Any], described: Option) -> type[Any]:
    """Return the data class under which `--help` lists a field of `kind`: see `Option.group`."""
    declaring = [base for base in kind.__mro__ if field.name in vars(base).get("__annotations__", ())]
    return described.group or declaring[-1]


def group_title(group: type[Any]) -> str:
    """Return the words of a class name.

    Example:
        >>> group_title(type("LoRAOptions", (), {}))
        'LoRA options'
    """
    first, *others = re.sub(r"(?<=[A-Za-z])(?=[A-Z][a-z])", " ", group.__name__).split()
    return " ".join([first, *map(str.lower, others)])
