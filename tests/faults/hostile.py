"""Strategies of inputs that nobody means well by: values, damaged texts, and command lines."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from hypothesis import strategies as st

DEEP = 20_000
ODD_TEXTS = [
    "",
    " ",
    "x",
    "\n# h",
    "a\nb",
    "\0",
    "\ud800",
    "caf\u00e9",
    "../..",
    "/proc/self/mem",
    "~",
    "-1",
    "1e400",
    "nan",
]
ODD_VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1.5, 10**12, -(10**12), 10**30, 1e300, float("nan"), float("inf"), -float("inf")),
    *([], {}, [1], [None], {"a": 1}, {"a": {"b": []}}, [[[]]], *ODD_TEXTS),
]

scalars = st.one_of(st.sampled_from(ODD_VALUES), st.integers(), st.floats(), st.text(max_size=20))
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)


@st.composite
def changed(draw: st.DrawFn, intact: Any) -> Any:
    """Return a JSON value with up to three of its parts replaced, removed or added."""
    value = json.loads(json.dumps(intact))
    for _ in range(draw(st.integers(1, 3))):
        value = _change(draw, value)
    return value


def _change(draw: st.DrawFn, value: Any) -> Any:
    if isinstance(value, dict) and value and draw(st.integers(0, 9)):
        key = draw(st.sampled_from(sorted(value)))
        action = draw(st.sampled_from(["into", "into", "remove", "add", "rename"]))
        rest = {name: kept for name, kept in value.items() if name != key}
        if action == "remove":
            return rest
        if action == "add":
            return {**value, draw(st.text(max_size=8)): draw(values)}
        if action == "rename":
            return {**rest, draw(st.text(max_size=8)): value[key]}
        return {**value, key: _change(draw, value[key])}
    if isinstance(value, list) and value and draw(st.integers(0, 9)):
        index = draw(st.integers(0, len(value) - 1))
        return [*value[:index], _change(draw, value[index]), *value[index + 1 :]]
    return draw(values)


def damaged(intact: bytes) -> st.SearchStrategy[bytes]:
    """Return bytes that were cut, overwritten, repeated, or replaced by something else."""

    @st.composite
    def strategy(draw: st.DrawFn) -> bytes:
        action = draw(st.sampled_from(["cut", "overwrite", "insert", "other", "deep"]))
        at = draw(st.integers(0, max(0, len(intact) - 1)))
        if action == "cut":
            return intact[:at]
        if action == "other":
            return draw(st.binary(max_size=200))
        if action == "deep":
            opening = draw(st.sampled_from([b"[", b'{"a":', b"- ", b"("]))
            return opening * DEEP
        some = draw(st.binary(min_size=1, max_size=8))
        return intact[:at] + some + intact[at + (len(some) if action == "overwrite" else 0) :]

    return strategy()


def json_texts(intact: Mapping[str, Any]) -> st.SearchStrategy[bytes]:
    """Return the bytes of a JSON file whose values or bytes were changed."""
    as_bytes = json.dumps(intact).encode()
    dumped = changed(intact).map(lambda value: json.dumps(value, ensure_ascii=True).encode())
    return st.one_of(dumped, dumped, dumped, damaged(as_bytes))


def json_lines(intact: Sequence[Mapping[str, Any]]) -> st.SearchStrategy[bytes]:
    """Return the bytes of a file of JSON lines, one of which was changed."""
    lines = [json.dumps(line).encode() + b"\n" for line in intact]

    @st.composite
    def strategy(draw: st.DrawFn) -> bytes:
        index = draw(st.integers(0, len(lines) - 1))
        end = draw(st.sampled_from([b"\n", b"\n", b"\n", b"", b"\r\n", b"\n\n"]))
        line = draw(json_texts(intact[index]))
        return b"".join([*lines[:index], line + end, *lines[index + 1 :]])

    return st.one_of(strategy(), strategy(), damaged(b"".join(lines)))


def command_lines(flags: Sequence[str], words: Sequence[str] = ()) -> st.SearchStrategy[list[str]]:
    """Return arguments: flags with fitting and unfitting values, words, and noise; none has a NUL, as on a real one."""
    text = st.one_of(
        st.sampled_from([odd for odd in ODD_TEXTS if "\0" not in odd]),
        st.integers().map(str),
        st.floats().map(str),
        st.sampled_from(["true", "false", "auto", "latest", "1", "8", "0.5", "1e-3", "quickstart", "pydocs"]),
        st.text(st.characters(exclude_characters="\0"), max_size=12),
        st.binary(max_size=6).map(lambda octets: octets.replace(b"\0", b"").decode("utf-8", "surrogateescape")),
    )
    flag = st.sampled_from(list(flags))
    pieces = st.one_of(
        st.tuples(flag, text).map(list),
        st.tuples(flag, text).map(lambda pair: ["=".join(pair)]),
        flag.map(lambda name: [name]),
        text.map(lambda word: [word]),
        st.sampled_from([["--help"], ["-h"], ["--"], ["--no_such_flag"], ["-x"]]),
        *([st.sampled_from([[word] for word in words])] * 2 if words else []),
    )
    return st.lists(pieces, max_size=6).map(lambda parts: [argument for part in parts for argument in part])
