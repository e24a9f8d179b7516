"""The Space: a chat with a published model, and the record of its training.

Environment, or `models.json` beside this file:
    MODEL_ID: user/name, user/name@revision, or a folder.
    BASE_MODEL_ID: a second model to compare with; optional.
Environment only:
    REPLY_SECONDS: time limit for one reply (default: 60 to 300, by the model's speed on this machine).
    MESSAGES_PER_MINUTE: limit for each visitor (default 12).
"""

import html
import importlib.util
import json
import math
import os
import traceback
from pathlib import Path

import gradio as gr
from starlette.middleware import Middleware

from api import add_api
from card import limits, summary
from chat_tab import ChatTab
from language_model import LanguageModel
from model_source import ModelUnavailableError
from page_text import card_text
from replies import Chat, Demo
from training_tab import lineage, training_tab
from visitors import OwnFilesOnly, Visitors

HERE = Path(__file__).parent
QUEUE = 40  # maximum number of waiting visitors
FONTS = ["ui-sans-serif", "system-ui", "sans-serif"]  # fonts of the visitor's system: nothing is fetched
MONO_FONTS = ["ui-monospace", "Consolas", "monospace"]
# Whatever a model or a card says, the browser loads no picture, sound, frame or object from elsewhere.
NOTHING_FROM_ELSEWHERE = (
    "<meta http-equiv=\"Content-Security-Policy\" content=\"img-src 'self' data: blob:; media-src 'self' blob:; "
    "object-src 'none'; frame-src 'none'\">"
)


class SetupError(ValueError):
    """A variable of the Space that is missing or wrong; the message names it, and visitors may read it."""


def main() -> None:
    try:
        page = chat_page(build())
    except SetupError as error:
        page = failure_page(str(error))
    except Exception:  # visitors see a page, and only the log has the error
        traceback.print_exc()
        page = failure_page("The page could not be built from this model; the log of the Space says why")
    serve(page)


def build() -> Demo:
    """Read the variables, and load the models once for all visitors.

    Raises:
        SetupError: A variable is wrong, or a model cannot be loaded.
    """
    names = named_models()
    if not names.get("MODEL_ID"):
        raise SetupError("MODEL_ID is not set: no model is named")
    seconds = number("REPLY_SECONDS", 60) if os.environ.get("REPLY_SECONDS") else None
    messages = number("MESSAGES_PER_MINUTE", 12)
    model = loaded("MODEL_ID", names["MODEL_ID"])
    base = loaded("BASE_MODEL_ID", names["BASE_MODEL_ID"], answers=False) if names.get("BASE_MODEL_ID") else None
    return Demo(
        chat=Chat(model, seconds or model.reply_seconds),
        base=Chat(base, seconds or base.reply_seconds) if base else None,
        visitors=Visitors(math.ceil(messages)),
    )


def loaded(variable: str, model_id: str, answers: bool | None = None) -> LanguageModel:
    """Return the model that a variable names.

    Raises:
        SetupError: It cannot be loaded; the message has the reason if it is known, and the log any other.
    """
    try:
        return LanguageModel(model_id, answers)
    except ModelUnavailableError as error:
        raise SetupError(f"{variable} is {model_id}, and that model could not be loaded: {error}") from error
    except Exception as error:
        traceback.print_exc()
        raise SetupError(f"{variable} is {model_id}, and that model could not be loaded; the log says why") from error


def number(variable: str, default: float) -> float:
    """Return the positive number in a variable of the environment.

    Raises:
        SetupError: It is anything else.
    """
    text = os.environ.get(variable, "").strip() or str(default)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise SetupError(f"{variable} is {text}: it must be a number above 0, such as {default}")
    return value


def named_models() -> dict[str, str]:
    """Return the model ids from the environment or, without one, from the `models.json` published with this file.

    Raises:
        SetupError: The file is not a JSON object of names.
    """
    published = HERE / "models.json"
    try:
        names: dict[str, str] = json.loads(published.read_text("utf-8")) if published.is_file() else {}
        return names | {name: os.environ[name] for name in ("MODEL_ID", "BASE_MODEL_ID") if name in os.environ}
    except (ValueError, TypeError) as error:
        raise SetupError("models.json is not a JSON object with MODEL_ID and BASE_MODEL_ID") from error


def chat_page(demo: Demo) -> gr.Blocks:
    """Return the page with the chat, the training record and the API of one model."""
    model = demo.chat.model
    page = gr.Blocks(title=model.name, analytics_enabled=False, fill_width=True)
    with page:
        gr.Markdown(about(model), elem_id="about")
        with gr.Tab("Chat" if model.answers else "Write"):
            tab = ChatTab(demo)
        with gr.Tab("How it was trained"):
            training_tab(lineage(model.card, demo.base.model.card if demo.base else None))
        add_api(demo)
        tab.restore_on_load(page)
    return page


def about(model: LanguageModel) -> str:
    """Return Markdown with the model's name and, folded away, what it is and what it is not for."""
    size = f"{model.model.num_parameters():,} parameters, a context of {model.context:,} tokens"
    what = summary(model.card, f"A language model: {size}.")
    task = "" if model.answers else " It continues what you write."
    folded = f"<details>\n<summary>About this model and its limits</summary>\n\n{what}{task}\n\n{limits(model.card)}\n"
    return f"# {card_text(model.name)}\n\n{folded}\n</details>"


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


def look() -> gr.themes.Base:
    """Return the theme, with quiet text that is dark enough to read."""
    quiet, quiet_dark = "*neutral_600", "*neutral_400"
    return gr.themes.Soft(primary_hue="indigo", neutral_hue="slate", font=FONTS, font_mono=MONO_FONTS).set(
        color_accent="*primary_600",
        link_text_color="*primary_700",
        link_text_color_dark="*primary_300",
        block_title_text_color="*primary_700",
        block_title_text_color_dark="white",
        body_text_color_subdued=quiet,
        body_text_color_subdued_dark=quiet_dark,
        block_info_text_color=quiet,
        block_info_text_color_dark=quiet_dark,
        input_placeholder_color=quiet,
        input_placeholder_color_dark=quiet_dark,
    )


def serve(page: gr.Blocks) -> None:
    """Serve the page until the process ends; visitors beyond the queue see that it is full."""
    script = (HERE / "page.js").read_text("utf-8")
    page.queue(max_size=QUEUE).launch(
        theme=look(),
        css_paths=HERE / "style.css",
        head=f"{NOTHING_FROM_ELSEWHERE}\n<script>\n{script}</script>",
        footer_links=["api"],
        mcp_server=importlib.util.find_spec("mcp") is not None,
        enable_monitoring=False,
        ssr_mode=False,  # it would start a second server, in Node
        max_file_size="1mb",
        app_kwargs={"middleware": [Middleware(OwnFilesOnly)]},
    )


if __name__ == "__main__":
    main()
