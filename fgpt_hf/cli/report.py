"""`fgpt report`."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from fgpt_hf.errors import UserError

Runs = Annotated[list[Path], Argument(metavar="RUN", help="Folders of one run, or of several to compare.")]
Page = Annotated[Path | None, Option("--html", help="Also write the report to this file, with curves and samples.")]
Watch = Annotated[bool, Option("--watch", help="Show a run while it trains, until it is finished or Ctrl-C.")]


def report(runs: Runs, html: Page = None, watch: Watch = False) -> None:
    """Report on a run, compare several, or watch one.

    Example: fgpt report runs/quickstart/base runs/mine/base --html report.html
    """
    if watch and html is not None:
        raise UserError("--watch and --html exclude each other: write the page once the run is finished")
    if html is not None:
        from fgpt_hf.report.page import check_page_path

        check_page_path(html)
    if watch:
        from fgpt_hf.report.watch import only_run, watch_run

        watch_run(only_run(runs))
    elif len(runs) == 1:
        _report_run(runs[0])
    else:
        _compare_runs(runs)
    if html is not None:
        from fgpt_hf.report.comparison import read_runs
        from fgpt_hf.report.page import write_page

        write_page(read_runs(runs), html)
        print(f"\nthe report as a page:  {html}")


def _report_run(run: Path) -> None:
    from fgpt_hf.hub.run_record import check_records
    from fgpt_hf.report.figures import draw_figures
    from fgpt_hf.report.summary import summarize_run

    summary = summarize_run(run)
    check_records(run)
    draw_figures(run)
    print(summary)


def _compare_runs(runs: list[Path]) -> None:
    from fgpt_hf.report.comparison import comparison_table, draw_comparison, format_table, read_runs

    compared = read_runs(runs)
    figure = runs[0] / "figures" / "comparison.png"
    figure.parent.mkdir(exist_ok=True)
    draw_comparison(compared, figure)
    print(f"{format_table(comparison_table(compared))}\n\ntheir curves over steps, tokens and hours:  {figure}")
