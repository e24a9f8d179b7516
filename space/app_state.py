"""What the page and the API share: the models, the limit for each visitor."""

import ipaddress
from dataclasses import dataclass
from typing import Any

import gradio as gr

from chat import Chat
from rate_limit import Visitors

MODEL_QUEUE: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}  # of every event that writes


@dataclass(frozen=True)
class Demo:
    """The model, the base model to compare it with, and who may ask them how often."""

    chat: Chat
    base: Chat | None
    visitors: Visitors


def visitor(request: gr.Request) -> str:
    """The address that a message came from: the last public one on its way, since what stands before it can be forged.

    A Space's proxies have private addresses, and the first of them adds who asked. Without a public one, the nearest.
    """
    nearest = request.client.host if request.client else ""
    way = [*request.headers.get("x-forwarded-for", "").split(","), nearest]
    return next(filter(_is_public, map(str.strip, reversed(way))), nearest)


def _is_public(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_global
    except ValueError:
        return False
