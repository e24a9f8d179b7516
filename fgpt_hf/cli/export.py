"""`fgpt export`."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from fgpt_hf.cli.options import ModelName


def export(
    model: ModelName,
    target: Annotated[
        Path, Argument(metavar="TARGET", help="New folder; for gguf, a new file whose name ends in .gguf.")
    ],
    format: Annotated[
        str,
        Option(
            "--format",
            metavar="FORMAT",
            help="auto (the class of transformers that computes the same, without remote code), or that class by name "
            "(gpt2, llama, qwen3, arcee, nanochat); gguf (llama.cpp, Ollama); onnx.",
        ),
    ] = "auto",
    outtype: Annotated[
        str | None,
        Option(
            "--outtype",
            metavar="TYPE",
            help="For gguf, type of the weights: F32, F16, BF16, Q8_0 or Q4_0 (default: F32).",
        ),
    ] = None,
) -> None:
    """Write a model in the format of another program.

    Example: fgpt export runs/quickstart/base base.gguf --format gguf --outtype Q8_0
    """
    from fgpt_hf.convert.export import export as export_model
    from fgpt_hf.files import size_of

    written = export_model(model, target, format, outtype)
    print(f"{target}: {model} as {format} ({written}), {size_of(target):,} bytes")
