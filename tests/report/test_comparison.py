"""Several runs side by side: a table, curves, a page that needs no other file, and a watch of one that trains."""

import json
import re
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import pytest
from PIL import Image

from fgpt_hf.cli.main import run
from fgpt_hf.errors import UserError
from fgpt_hf.report.comparison import comparison_table, draw_comparison, read_runs
from fgpt_hf.report.page import render_page
from fgpt_hf.report.watch import render_frame, sparkline, watch_run
from tests.report.test_summary import make_run

RECORD = """preset: tiny
dataset_name: /home/me/novels
num_hidden_layers: 2
hidden_size: 16
num_attention_heads: 2
max_position_embeddings: 64
max_steps: 20
"""

SHAPE = {"model_type": "fgpt", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    folders = [make_run(tmp_path / "runs" / "one" / "base"), make_run(tmp_path / "runs" / "two", steps=300)]
    more = {"hellaswag/acc": 0.25, "hellaswag/acc_norm": 0.31, "hellaswag/acc_norm_stderr": 0.01}
    folders.append(make_run(tmp_path / "runs" / "three", **more))
    for folder in folders[1:]:
        (folder / "run.yaml").write_text(RECORD)
    return folders


def test_runs_with_different_vocabularies_are_drawn_in_bits_per_byte(runs: list[Path]) -> None:
    drawn = []
    for vocabularies in ((50304, 50304), (50304, 320)):
        for folder, size in zip(runs[1:], vocabularies, strict=True):
            (folder / "model").mkdir(exist_ok=True)
            (folder / "model" / "config.json").write_text(json.dumps({**SHAPE, "vocab_size": size}))
        draw_comparison(read_runs(runs[1:]), canvas := StringIO())
        drawn.append(canvas.getvalue())
    labels = ["<!-- loss, nats -->", "<!-- bits per byte of held-out text -->"]
    assert [[label in each for label in labels] for each in drawn] == [[True, False], [False, True]]


def test_the_table_has_a_row_for_each_run_and_no_empty_column(runs: list[Path]) -> None:
    header, *rows = comparison_table(read_runs(runs))
    table = [dict(zip(header, row, strict=True)) for row in rows]
    assert [row["run"] for row in table] == ["one/base", "two", "three"]
    assert [row["data"] for row in table] == ["–", "novels", "novels"]
    assert [row["parameters"] for row in table] == ["–", "0.8M", "0.8M"]
    assert [row["tokens"] for row in table] == ["2K", "30K", "2K"]
    assert [row["validation loss"] for row in table] == ["8.500", "-19.500", "8.500"]
    assert [row["bits per byte"] for row in table] == ["4.500", "-9.500", "4.500"]
    assert [row["hellaswag"] for row in table] == ["–", "–", "0.310 ± 0.010"]
    assert "reward accuracy" not in header and "hellaswag/acc" not in header


@pytest.mark.slow
def test_the_command_prints_the_table_and_draws_the_curves(
    runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run(["report", *map(str, runs)])
    printed = capsys.readouterr().out
    assert "one/base" in printed and "validation loss" in printed
    figure = Path(printed.strip().rpartition("  ")[2])
    with Image.open(figure) as image:
        assert image.width > 1500 and len(image.convert("RGB").getcolors(1 << 24)) > 10


class Links(HTMLParser):
    """Collects what a page would load, and its texts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.texts: list[str] = []
        self.tags: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loaded += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.mark.slow
def test_the_page_needs_nothing_else_and_shows_samples_by_step(runs: list[Path], tmp_path: Path) -> None:
    evil = {"step": 20, "prompt": "<script>alert(1)</script>", "greedy": "{{ 7 * 7 }}", "sampled": "</td><b>bold"}
    with (runs[1] / "samples.jsonl").open("a") as file:
        file.write(json.dumps(evil) + "\n")
    run(["report", *map(str, runs), "--html", str(tmp_path / "report.html")])
    page = (tmp_path / "report.html").read_text("utf-8")
    found = Links(page)
    assert all(link.startswith("#") for link in found.loaded)
    assert not re.search(r"url\((?!#)", page) and "script" not in found.tags and "b" not in found.tags
    texts = " ".join(found.texts)
    for part in ("one/base", "<script>alert(1)</script>", "{{ 7 * 7 }}", "Step 20", "told at 300", "0.310 ± 0.010"):
        assert part in texts
    assert found.tags.count("svg") > 10 and found.tags.count("svg") == page.count("</svg>")


def test_one_run_has_a_page_too(runs: list[Path]) -> None:
    page = render_page(read_runs(runs[:1]))
    assert "over steps, tokens and hours" not in page and "Step 20" in page


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{0}", "{0}/../base"], "a run is named twice"),
        (["{0}", "{1}/nowhere"], "nowhere is not a run, because it has no run.yaml"),
        (["{0}", "{1}", "--html", "report.txt"], "--html report.txt: the name of the file should end in .html"),
        (["{0}", "--html", "nowhere/report.html"], "there is no folder nowhere"),
        (["{0}", "--html", "report.html", "--watch"], "--watch and --html exclude each other"),
        (["{0}", "{1}", "--watch"], "--watch shows one run, not 2"),
        (["{1}/nowhere", "--watch"], "nowhere is not a run"),
        ([], "Missing argument 'RUN'"),
    ],
)
def test_what_cannot_be_reported_is_one_line(
    runs: list[Path], arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        run(["report", *(argument.format(*runs) for argument in arguments)])


def test_a_watch_shows_progress_and_ends_with_the_run(
    runs: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = runs[2]
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:11]))
    frame = render_frame(folder, columns=80)
    assert "50% of 20" in frame and "ends at about" in frame and "training loss" in frame
    assert all(len(line) <= 80 for line in frame.splitlines())

    def finish(seconds: float) -> None:
        (folder / "metrics.jsonl").write_text("".join(lines))
        (folder / "model").mkdir()

    monkeypatch.setattr("fgpt_hf.report.watch.time.sleep", finish)
    watch_run(folder)
    printed = capsys.readouterr().out
    assert printed.index("50% of 20") < printed.index("100% of 20") < printed.index("finished")
    assert "\x1b" not in printed  # no terminal


def test_ctrl_c_ends_the_watch_and_not_with_an_error(runs: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fgpt_hf.report.watch.time.sleep", interrupt)
    watch_run(runs[1])


def test_a_run_without_a_step_is_waited_for(runs: list[Path]) -> None:
    (runs[1] / "metrics.jsonl").write_text("")
    assert "no step is finished yet" in render_frame(runs[1])


def test_a_curve_in_one_line_shows_where_values_are_missing_too() -> None:
    assert sparkline([float("nan"), 1.0, float("inf"), 2.0], width=10) == "▁█"
    assert sparkline([3.0] * 100, width=4) == "▁▁▁▁"
    assert sparkline([float("nan")], width=4) == ""
