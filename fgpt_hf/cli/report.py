"""`fgpt report`."""

from pathlib import Path
from typing import Annotated

from typer import Argument


def report(run: Annotated[Path, Argument(metavar="RUN", help="Folder of the run.")]) -> None:
    """Draw a run's figures and print its losses and samples.

    Example: fgpt report runs/quickstart/base
    """
    from fgpt_hf.hub.run_record import check_records
    from fgpt_hf.report import draw_figures, summarize_run

    summary = summarize_run(run)
    check_records(run)
    draw_figures(run)
    print(summary)
