"""What is compared: the default, each setting alone, and all together, or every combination."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from fgpt_hf.errors import UserError

DEFAULT, ALL = "default", "all together"  # names of variants
RESERVED = ("output_dir", "seed", "resume_from_checkpoint", "overwrite_output_dir", "config", "preset")


@dataclass(frozen=True)
class Axis:
    """Settings to compare, each a value by field; the first one is the default's."""

    settings: tuple[Mapping[str, str], ...]

    @property
    def fields(self) -> list[str]:
        """The fields that change along the axis."""
        return list(self.settings[0])


@dataclass(frozen=True)
class Variant:
    """A named choice of settings: values by field."""

    name: str
    settings: Mapping[str, str]


def parse_axis(text: str) -> Axis:
    """Return the axis `FIELD=VALUE,VALUE,…`, or `FIELD=A,B+FIELD=C,D` for fields that change together.

    Raises:
        UserError: it has no `=`, fewer than two values, a setting twice, unlike numbers of values, or a field that the
            ablation itself sets.

    Example:
        >>> parse_axis("mlp=plain,gated+hidden_act=gelu,silu").settings[1]
        {'mlp': 'gated', 'hidden_act': 'silu'}
    """
    columns = {}
    for part in text.split("+"):
        field, _, listed = part.partition("=")
        columns[field.strip().lstrip("-").replace("-", "_")] = [value.strip() for value in listed.split(",")]
    if reserved := next((field for field in columns if field in RESERVED), None):
        raise UserError(f"--vary {text}: the ablation itself sets {reserved}; for several seeds give --seeds 3")
    if len(set(map(len, columns.values()))) > 1:
        raise UserError(f"--vary {text}: fields that change together need equally many values, as in a=1,2+b=3,4")
    settings = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    are_different = all(each not in settings[:index] for index, each in enumerate(settings))
    if len(settings) < 2 or not are_different or not all(all(values) for values in columns.values()):
        raise UserError(f"--vary {text}: give a field and two or more different values, as in optim=muon,adamw")
    return Axis(tuple(settings))


def make_variants(axes: Sequence[Axis], every_combination: bool = False) -> list[Variant]:
    """Return the default, each other setting alone, and all last ones together; or every combination.

    Raises:
        UserError: a field is varied twice.

    Example:
        >>> axes = [parse_axis("optim=muon,adamw"), parse_axis("weight_decay=0.1,0")]
        >>> [variant.name for variant in make_variants(axes)]
        ['default', 'optim=adamw', 'weight_decay=0', 'all together']
    """
    fields = [field for axis in axes for field in axis.fields]
    if twice := next((field for field in fields if fields.count(field) > 1), None):
        raise UserError(f"--vary {twice} is given twice: give its values once, as {twice}=A,B,C")
    first = _merged([axis.settings[0] for axis in axes])
    if every_combination:
        return _named([_merged(each) for each in product(*(axis.settings for axis in axes))], first)
    alone = [{**first, **setting} for axis in axes for setting in axis.settings[1:]]
    together = Variant(ALL, _merged([axis.settings[-1] for axis in axes]))
    return [*_named([first, *alone], first), *([together] if len(axes) > 1 else [])]


def _merged(settings: Sequence[Mapping[str, str]]) -> dict[str, str]:
    return {field: value for each in settings for field, value in each.items()}


def _named(variants: Sequence[Mapping[str, str]], first: Mapping[str, str]) -> list[Variant]:
    """Name each variant by what differs from the default."""
    changes = [[f"{field}={value}" for field, value in each.items() if value != first[field]] for each in variants]
    return [Variant(",".join(changed) or DEFAULT, each) for changed, each in zip(changes, variants, strict=True)]
