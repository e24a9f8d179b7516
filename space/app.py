"""The Space: a chat with a published model, and the record of its training.

Environment, or `models.json` beside this file:
    MODEL_ID: user/name, user/name@revision, or a folder.
    BASE_MODEL_ID: a second model to compare with; optional.
Environment only:
    REPLY_SECONDS: time limit for one reply (default: 60 to 300, by the model's speed on this machine).
    MESSAGES_PER_MINUTE: limit for each visitor (default 12).
"""

import json
import math
import os
import traceback
from pathlib import Path

from app_state import Demo
from chat import Chat
from language_model import LanguageModel
from model_source import ModelUnavailableError
from page import chat_page, failure_page, serve
from rate_limit import Visitors

HERE = Path(__file__).parent


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
        SetupError: a variable is wrong, or a model cannot be loaded.
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
        SetupError: it cannot be loaded; the message has the reason if it is known, and the log any other.
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
        SetupError: it is anything else.
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
        SetupError: the file is not a JSON object of names.
    """
    published = HERE / "models.json"
    try:
        names: dict[str, str] = json.loads(published.read_text("utf-8")) if published.is_file() else {}
        return names | {name: os.environ[name] for name in ("MODEL_ID", "BASE_MODEL_ID") if name in os.environ}
    except (ValueError, TypeError) as error:
        raise SetupError("models.json is not a JSON object with MODEL_ID and BASE_MODEL_ID") from error


if __name__ == "__main__":
    main()
