"""The page as a whole, what stands in its place when there is no model, and how both are served."""

import html
import importlib.util
from pathlib import Path

import gradio as gr

from api import add_api
from app_state import Demo
from chat_tab import ChatTab
from model_summary import described
from training_tab import training_tab

QUEUE = 40  # maximum number of waiting visitors
STYLE = Path(__file__).with_name("style.css")
FONTS = ["ui-sans-serif", "system-ui", "sans-serif"]  # fonts of the visitor's system: nothing is fetched
MONO_FONTS = ["ui-monospace", "Consolas", "monospace"]


def chat_page(demo: Demo) -> gr.Blocks:
    """Return the page with the chat, the training record and the API of one model."""
    model = demo.chat.model
    page = gr.Blocks(title=model.name, analytics_enabled=False)
    with page:
        gr.Markdown(described(model), elem_id="about")
        with gr.Tab("Chat" if model.answers else "Write"):
            ChatTab(demo)
        with gr.Tab("How it was trained"):
            training_tab([model, *([demo.base.model] if demo.base else [])])
        add_api(demo)
    return page


def failure_page(problem: str) -> gr.Blocks:
    """Return the page for a Space that cannot start: the problem, and the settings that its owner can change."""
    page = gr.Blocks(title="This Space could not start", analytics_enabled=False)
    with page:
        gr.HTML(
            f"<h1>This Space could not start</h1><p>{html.escape(problem[:400])}.</p>"
            "<p>For the owner of this Space: change it under Settings, Variables, and restart. <code>MODEL_ID</code> "
            "is a model on the Hub, <code>user/name</code> or <code>user/name@revision</code>; a private one also "
            "needs the secret <code>HF_TOKEN</code>.</p>",
            elem_id="failure",
        )
    return page


def serve(page: gr.Blocks) -> None:
    """Serve the page until the process ends; visitors beyond the queue see that it is full."""
    page.queue(max_size=QUEUE).launch(
        theme=gr.themes.Soft(primary_hue="indigo", neutral_hue="slate", font=FONTS, font_mono=MONO_FONTS),
        css_paths=STYLE,
        footer_links=["api", "settings"],
        mcp_server=importlib.util.find_spec("mcp") is not None,
        enable_monitoring=False,
        ssr_mode=False,  # it would start a second server, in Node
        max_file_size="1mb",
    )
