"""What is compared: the default, each setting alone, and all together, or every combination."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from fgpt_hf.errors import UserError

DEFAULT, ALL = "default", "all together"  # names of variants
RESERVED = ("output_dir", "seed", "resume_from_checkpoint", "overwrite_output_dir", "config", "preset")


@dataclass(frozen=True)
class Axis:
    """A field of the run and the values to compare; the first one is the default's."""

    field: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Variant:
    """A named choice of settings: values by field."""

    name: str
    settings: Mapping[str, str]


def parse_axis(text: str) -> Axis:
    """Return the axis `FIELD=VALUE,VALUE,…`.

    Raises:
        UserError: it has no `=`, fewer than two values, one value twice, or a field that the ablation itself sets.

    Example:
        >>> parse_axis("optim=muon,adamw")
        Axis(field='optim', values=('muon', 'adamw'))
    """
    field, _, listed = text.partition("=")
    field, values = field.strip().lstrip("-").replace("-", "_"), tuple(value.strip() for value in listed.split(","))
    if len(values) < 2 or not all(values) or len(set(values)) < len(values):
        raise UserError(f"--vary {text}: give a field and two or more different values, as in optim=muon,adamw")
    if field in RESERVED:
        raise UserError(f"--vary {text}: the ablation itself sets {field}; for several seeds give --seeds 3")
    return Axis(field, values)


def make_variants(axes: Sequence[Axis], every_combination: bool = False) -> list[Variant]:
    """Return the default, each other value alone, and all last values together; or every combination.

    Raises:
        UserError: a field is varied twice.

    Example:
        >>> axes = [Axis("optim", ("muon", "adamw")), Axis("weight_decay", ("0.1", "0"))]
        >>> [variant.name for variant in make_variants(axes)]
        ['default', 'optim=adamw', 'weight_decay=0', 'all together']
    """
    fields = [axis.field for axis in axes]
    if twice := next((field for field in fields if fields.count(field) > 1), None):
        raise UserError(f"--vary {twice} is there twice: give its values once, as {twice}=A,B,C")
    first = {axis.field: axis.values[0] for axis in axes}
    if every_combination:
        return _named([dict(zip(fields, each, strict=True)) for each in product(*(a.values for a in axes))], first)
    alone = [{**first, axis.field: value} for axis in axes for value in axis.values[1:]]
    together = Variant(ALL, {axis.field: axis.values[-1] for axis in axes})
    return [*_named([first, *alone], first), *([together] if len(axes) > 1 else [])]


def _named(variants: Sequence[Mapping[str, str]], first: Mapping[str, str]) -> list[Variant]:
    """Name each variant by what differs from the default."""
    changes = [[f"{field}={value}" for field, value in each.items() if value != first[field]] for each in variants]
    return [Variant(",".join(changed) or DEFAULT, each) for changed, each in zip(changes, variants, strict=True)]
