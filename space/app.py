"""The Space: a chat with a published model, and the record of its training.

Environment, or `models.json` beside this file:
    MODEL_ID: user/name, user/name@revision, or a folder.
    BASE_MODEL_ID: a second model to compare with; optional.
Environment only:
    REPLY_SECONDS: time limit for one reply (default: 60 to 300, by the model's speed on this machine).
    MESSAGES_PER_MINUTE: limit for each visitor (default 12).
"""

import json
import os
import traceback
from pathlib import Path

from app_state import Demo
from chat import Chat
from language_model import LanguageModel
from page import chat_page, failure_page, serve
from rate_limit import Visitors

HERE = Path(__file__).parent


def main() -> None:
    try:
        page = chat_page(build())
    except Exception as error:  # visitors see a page with the problem, and the log has the traceback
        traceback.print_exc()
        page = failure_page(named_models().get("MODEL_ID"), error)
    serve(page)


def build() -> Demo:
    """Load the models once for all visitors."""
    names = named_models()
    if not names.get("MODEL_ID"):
        raise ValueError("MODEL_ID is not set")
    seconds = os.environ.get("REPLY_SECONDS")
    limit = float(seconds) if seconds else None
    model = LanguageModel(names["MODEL_ID"])
    base = LanguageModel(names["BASE_MODEL_ID"], answers=False) if names.get("BASE_MODEL_ID") else None
    return Demo(
        chat=Chat(model, limit or model.reply_seconds),
        base=Chat(base, limit or base.reply_seconds) if base else None,
        visitors=Visitors(int(os.environ.get("MESSAGES_PER_MINUTE", 12))),
    )


def named_models() -> dict[str, str]:
    """Return the model ids from the environment or, without one, from the `models.json` published with this file."""
    published = HERE / "models.json"
    names: dict[str, str] = json.loads(published.read_text("utf-8")) if published.is_file() else {}
    return names | {name: os.environ[name] for name in ("MODEL_ID", "BASE_MODEL_ID") if name in os.environ}


if __name__ == "__main__":
    main()
