"""Arguments that several commands have in common."""

from typing import Annotated

from typer import Argument, Option

from fgpt_hf.config.options import Limits

ModelName = Annotated[
    str, Argument(metavar="MODEL", help="Folder of a model or a run, or the id of a model on the Hub.")
]
TrustRemoteCode = Annotated[
    bool, Option("--trust_remote_code", help="Run the code that comes with a model, if it is not the installed one.")
]
SEEDS = Limits(minimum=0, maximum=2**32 - 1)  # those of NumPy
