"""Runs as one self-contained HTML file: the table, curves, and samples by step."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, StrictUndefined

from fgpt_hf.errors import UserError
from fgpt_hf.files import write_atomically
from fgpt_hf.report.comparison import ComparedRun, comparison_table, draw_comparison
from fgpt_hf.report.figures import draw_figure, figures_of
from fgpt_hf.report.next_steps import describe_result
from fgpt_hf.training.records import read_samples

TEMPLATE = Path(__file__).with_name("page.html.jinja")
TEXTS = ("prompt", "greedy", "sampled")


class RunSection(NamedTuple):
    """A run on the page: a sentence, its figures as SVG by name, and its samples by step."""

    name: str
    sentence: str
    figures: Mapping[str, str]
    samples: Mapping[int, Sequence[Mapping[str, Any]]]


def write_page(runs: Sequence[ComparedRun], path: Path) -> None:
    """Write the page of one run or several to a path that `check_page_path` accepts."""
    write_atomically(path, render_page(runs))


def check_page_path(path: Path) -> None:
    """Raise UserError if a file's name does not end in `.html`, or its folder does not exist."""
    if path.suffix not in (".html", ".htm"):
        raise UserError(f"--html {path}: the name of the file should end in .html")
    if not path.parent.is_dir():
        raise UserError(f"--html {path}: there is no folder {path.parent}")


def render_page(runs: Sequence[ComparedRun]) -> str:
    """Return the page as HTML, which needs no other file and no network."""
    header, *rows = comparison_table(runs)
    sections = [_section(run) for run in runs]
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    title = f"{len(runs)} runs" if len(runs) > 1 else runs[0].name
    return template.render(
        title=title, header=header, rows=rows, comparison=_comparison(runs), sections=sections, texts=TEXTS
    )


def _comparison(runs: Sequence[ComparedRun]) -> str:
    file = io.StringIO()
    draw_comparison(runs, file)
    return _inline(file)


def _section(run: ComparedRun) -> RunSection:
    drawn = {}
    for name, figure in figures_of(run.metrics).items():
        file = io.StringIO()
        draw_figure(run.metrics, figure, file)
        drawn[name] = _inline(file)
    samples: dict[int, list[Mapping[str, Any]]] = {}
    for line in read_samples(run.folder):
        samples.setdefault(line["step"], []).append(line)
    is_finished = (run.folder / "model").is_dir()
    return RunSection(run.name, describe_result(run.recorded, run.metrics, is_finished), drawn, samples)


def _inline(file: io.StringIO) -> str:
    """Return an SVG without the head of a file of its own."""
    text = file.getvalue()
    return text[text.index("<svg") :]
