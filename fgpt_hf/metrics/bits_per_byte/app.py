"""The metric's Space: its inputs as JSON, its results, and its card."""

import json
from pathlib import Path
from typing import Any

import gradio as gr
from bits_per_byte import BitsPerByte

EXAMPLE = '{"negative_log_likelihoods": [6.0, 2.5], "tokens": [3, 1], "bytes": [12, 4], "words": [3, 1]}'


def compute(text: str) -> dict[str, float]:
    """Return the results for inputs written as a JSON object; an error becomes a message on the page."""
    try:
        inputs: Any = json.loads(text)
        return BitsPerByte().compute(**inputs)
    except (TypeError, ValueError) as error:
        raise gr.Error(str(error)) from error


def page() -> gr.Interface:
    """Return the page, not yet served."""
    card = Path(__file__).with_name("README.md").read_text(encoding="utf-8").split("---\n", 2)[2]
    inputs = gr.Textbox(EXAMPLE, lines=8, label="inputs, as JSON")
    return gr.Interface(
        compute, inputs, gr.JSON(label="results"), title="bits_per_byte", article=card, flagging_mode="never"
    )


if __name__ == "__main__":
    page().launch()
