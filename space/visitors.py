"""Who visits, how often each visitor may send a message, and what none may have this server fetch."""

import ipaddress
import os
import time
from collections import deque
from threading import Lock
from urllib.parse import urlsplit

import gradio as gr
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send


class Visitors:
    """Counts each visitor's messages of the last minute, and forgets visitors without any."""

    def __init__(self, messages_per_minute: int) -> None:
        self.messages_per_minute = messages_per_minute
        self._times: dict[str, deque[float]] = {}
        self._lock = Lock()

    def admit(self, visitor: str) -> None:
        """Count one more message.

        Raises:
            ValueError: It exceeds the limit; the message says how long to wait.
        """
        now = time.monotonic()
        with self._lock:
            self._forget(now - 60)
            times = self._times.setdefault(visitor, deque())
            if len(times) >= self.messages_per_minute:
                wait = times[0] + 60 - now
                raise ValueError(
                    f"that is more than {self.messages_per_minute} messages a minute: try again in {wait:.0f} seconds"
                )
            times.append(now)

    def _forget(self, before: float) -> None:
        for visitor, times in list(self._times.items()):
            while times and times[0] < before:
                times.popleft()
            if not times:
                del self._times[visitor]


def visitor_of(request: gr.Request) -> str:
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


class OwnFilesOnly:
    """Refuses what Gradio's route for files would fetch for anyone from any public address."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, unless it asks for a file from elsewhere."""
        asked = scope.get("path", "").partition("/file=")[2]
        answer = PlainTextResponse("Only files of this page.", 403) if urlsplit(asked).scheme else self.app
        await answer(scope, receive, send)
