"""Put values that come from elsewhere into a Markdown page without letting them change the page."""

import html
import re
from collections.abc import Iterable
from urllib.parse import quote

_SPECIAL = re.compile(r"([\\`*_~\[\]$|#!])")
_PLAIN_CODE = re.compile(r"[^`|<>&\n\r]+")


class Markdown(str):
    """Text that is Markdown already: `text` leaves it alone."""


def text(value: object, line_break: str = " ") -> Markdown:
    r"""Return a value as plain text on one line, safe in a heading, a paragraph, a link or a cell of a table.

    Example:
        >>> text("# a | <script>\nb")
        '\\# a \\| &lt;script&gt; b'
    """
    if isinstance(value, Markdown):
        return value
    lines = html.escape(str(value).strip(), quote=False).splitlines()
    return Markdown(line_break.join(_SPECIAL.sub(r"\\\1", line) for line in lines))


def code(value: object) -> Markdown:
    """Return a value as inline code, in backticks unless it holds what would end them or a cell of a table.

    Example:
        >>> code("max_steps"), code("a|b")
        ('`max_steps`', '<code>a\\\\|b</code>')
    """
    shown = str(value)
    return Markdown(f"`{shown}`" if _PLAIN_CODE.fullmatch(shown) else f"<code>{text(shown)}</code>")


def code_block(value: str, language: str = "text") -> Markdown:
    """Return a fenced block that shows text unchanged, with a fence longer than any inside.

    Example:
        >>> print(code_block("a ``` b"))
        ````text
        a ``` b
        ````
    """
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", value)), default=0))
    return Markdown(f"{fence}{language}\n{value}\n{fence}")


def link(label: object, url: str) -> Markdown:
    """Return a link; the label and the address are escaped.

    Example:
        >>> link("user/data", "https://huggingface.co/datasets/user/data")
        '[user/data](https://huggingface.co/datasets/user/data)'
    """
    return Markdown(f"[{text(label)}]({quote(url, safe=':/#?&=%+,;@~')})")


def table(header: Iterable[object], rows: Iterable[Iterable[object]]) -> Markdown:
    """Return a table, its cells escaped by `text`.

    Example:
        >>> print(table(("task", "acc"), [("hellaswag", 0.3)]))
        | task | acc |
        | --- | --- |
        | hellaswag | 0.3 |
    """
    columns = list(header)
    lines: list[Iterable[object]] = [columns, [Markdown("---")] * len(columns), *rows]
    return Markdown("\n".join(f"| {' | '.join(text(cell) for cell in line)} |" for line in lines))
