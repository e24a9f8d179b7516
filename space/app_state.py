"""State that the page and the API share: the models, and the rate limit of each visitor."""

import ipaddress
from dataclasses import dataclass
from typing import Any

import gradio as gr

from chat import Chat
from rate_limit import Visitors

MODEL_QUEUE: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}  # for every event that generates text


@dataclass(frozen=True)
class Demo:
    """The model, the base model to compare it with, and the rate limit of visitors."""

    chat: Chat
    base: Chat | None
    visitors: Visitors


def visitor(request: gr.Request) -> str:
    """Return the address that a request came from: the last public one in `X-Forwarded-For`, or else the nearest one.

    A visitor can forge the addresses before it. The proxies of a Space have private addresses, and the first of them
    appends the address of the visitor.
    """
    nearest = request.client.host if request.client else ""
    addresses = [*request.headers.get("x-forwarded-for", "").split(","), nearest]
    return next(filter(_is_public, map(str.strip, reversed(addresses))), nearest)


def _is_public(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_global
    except ValueError:
        return False
