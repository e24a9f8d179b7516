"""`fgpt export`."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option


def export(
    model: Annotated[
        str, Argument(metavar="MODEL", help="Folder of a model or a run, or the id of a model on the Hub.")
    ],
    target: Annotated[
        Path, Argument(metavar="TARGET", help="New folder; for gguf, a new file whose name ends in .gguf.")
    ],
    format: Annotated[
        str, Option("--format", help="gpt2 (transformers' own class, without remote code), gguf (llama.cpp) or onnx.")
    ],
) -> None:
    """Write an FGPT model in the format of another program.

    Example: fgpt export runs/quickstart/base base.gguf --format gguf
    """
    from fgpt_hf.convert.export import export as export_model

    export_model(model, target, format)
    print(f"{target}: {model} as {format}")
