"""State that the page and the API share: the models, and the rate limit of each visitor."""

import ipaddress
import os
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
    """Return what a visitor is counted by: an IPv4 address, or the /64 of an IPv6 address, which is one household.

    On a Space it is the last public address in `X-Forwarded-For`: a visitor can forge those before it, and the proxies
    of a Space have private addresses, of which the first appends the visitor's. Elsewhere the header counts for nothing
    here; uvicorn reads it for a proxy on this machine, or one that `FORWARDED_ALLOW_IPS` names.
    """
    nearest = request.client.host if request.client else ""
    forwarded = request.headers.get("x-forwarded-for", "").split(",") if "SPACE_ID" in os.environ else []
    addresses = [address for text in (nearest, *reversed(forwarded)) if (address := _parsed(text.strip()))]
    return _counted(next((address for address in addresses if address.is_global), next(iter(addresses), None)))


_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def _parsed(text: str) -> _Address | None:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _counted(address: _Address | None) -> str:
    if isinstance(address, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((int(address), 64), strict=False))
    return str(address or "unknown")
