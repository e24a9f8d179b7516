"""The metric's Space: its inputs as JSON, its results, and its card."""

import json
from pathlib import Path
from typing import Any

import gradio as gr
from hellaswag import HellaSwag

EXAMPLE = (
    '{"log_likelihoods": [[-4.0, -6.0]], "tokens": [[1, 3]], "characters": [[4, 7]], "bytes": [[4, 7]], "labels": [1]}'
)


def compute(text: str) -> dict[str, float]:
    """Return the results for inputs written as a JSON object; an error becomes a message on the page."""
    try:
        inputs: Any = json.loads(text)
        return HellaSwag().compute(**inputs)
    except (TypeError, ValueError) as error:
        raise gr.Error(str(error)) from error


def page() -> gr.Interface:
    """Return the page, not yet served."""
    card = Path(__file__).with_name("README.md").read_text(encoding="utf-8").split("---\n", 2)[2]
    inputs = gr.Textbox(EXAMPLE, lines=8, label="inputs, as JSON")
    return gr.Interface(
        compute, inputs, gr.JSON(label="results"), title="hellaswag", article=card, flagging_mode="never"
    )


if __name__ == "__main__":
    page().launch()
