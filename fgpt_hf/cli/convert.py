"""`fgpt convert`."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option


def convert(
    source: Annotated[
        str,
        Argument(
            metavar="SOURCE",
            help="A .pth file of the original FGPT, nanoGPT's ckpt.pt, or a GPT-2, Llama, Qwen3, Arcee or nanochat "
            "with GPT-2's tokens: its folder or its Hub id.",
        ),
    ],
    folder: Annotated[Path, Argument(metavar="FOLDER", help="New folder for the model.")],
    vocab_size: Annotated[
        int | None,
        Option("--vocab_size", help="Tokens in the vocabulary (default: those of the source, at least 50304)."),
    ] = None,
    num_attention_heads: Annotated[
        int | None,
        Option("--num_attention_heads", help="Attention heads (default: as nanoGPT recorded, or the original's 24)."),
    ] = None,
) -> None:
    """Convert weights of another program to an FGPT model.

    Example: fgpt convert weights.pth models/old
    """
    from fgpt_hf.convert.convert import convert as convert_weights

    layout, model = convert_weights(source, folder, vocab_size, num_attention_heads)
    print(f"{folder}: {model.num_parameters():,} parameters from the layout {layout}")
