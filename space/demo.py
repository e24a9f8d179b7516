"""What the page and the API share: the models, the limit for each visitor."""

from dataclasses import dataclass
from typing import Any

import gradio as gr

from chat import Chat
from visitors import Visitors

MODEL_QUEUE: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}  # of every event that writes


@dataclass(frozen=True)
class Demo:
    """The model, the base model to compare it with, and who may ask them how often."""

    chat: Chat
    base: Chat | None
    visitors: Visitors


def visitor(request: gr.Request) -> str:
    """The address that a message came from: behind a proxy, as on a Space, the one that the proxy names."""
    forwarded = request.headers.get("x-forwarded-for", "").partition(",")[0].strip()
    return forwarded or (request.client.host if request.client else "")
