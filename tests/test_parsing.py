"""Text and values that others wrote are parsed, or are one UserError, within a moment."""

from dataclasses import dataclass, field

import pytest

from fgpt_hf.errors import UserError
from fgpt_hf.parsing import as_type, parse_json, parse_yaml

BOMB = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 8)}]" for n in range(1, 12))]
)
MERGES = "\n".join(
    ["a0: &a0 {x: 1}", *(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 8)}]}}" for n in range(1, 12))]
)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "text",
    [
        BOMB,
        MERGES,
        "[" * 100_000,
        "x: " + "9" * 5000,
        "x: 2020-13-45",
        "x: !!python/object/apply:os.system ['true']",
        "x: !!binary §",
        "? [1]\n: 2",
        "\x00",
        "a: b: c",
        "x: y\n" * 1_000_000,
    ],
    ids=range(11),
)
def test_yaml_that_is_not_plain_is_one_error(text: str) -> None:
    with pytest.raises(UserError, match="^it is not plain YAML: "):
        parse_yaml(text)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "9" * 5000, b"\xff", '{"a": 1} x'])
def test_json_that_is_none_is_one_error(text: str | bytes) -> None:
    with pytest.raises(UserError, match="^it is not JSON: "):
        parse_json(text)


@dataclass(frozen=True)
class Inner:
    value: int


@dataclass(frozen=True)
class Outer:
    inner: Inner
    names: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.inner.value < 0:
            raise UserError("value=-1 must be zero or more")


def test_values_of_the_right_types_become_the_class_and_unknown_names_are_left_out() -> None:
    assert as_type(Outer, {"inner": {"value": 5}, "names": ["a"], "later": 1}) == Outer(Inner(5), ["a"])


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "^inner="),
        ({"inner": {"value": "x"}}, "^inner.value='x': "),
        ({"inner": {"value": float("nan")}}, "^inner.value='nan': "),
        ({"inner": 5}, "^inner='5': "),
        ({"inner": {"value": 1}, "names": "abc"}, "^names='abc': "),
        ({"inner": {"value": -1}}, "^value=-1 must be zero or more$"),
    ],
)
def test_values_of_other_types_are_named(values: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        as_type(Outer, values)
