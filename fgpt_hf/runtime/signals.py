"""Stop on SIGTERM and SIGINT: at once, with the cleanup of everything that is open, or after the current step.

Schedulers send SIGTERM before they take a machine away, and Ctrl-C is SIGINT. Launchers pass on what they receive, so a
worker may get one request twice: a signal soon after another one is taken for the same.
"""

import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from fgpt_hf.workers import STOP_SIGNALS, exit_code_of

logger = logging.getLogger(__name__)

SAME_REQUEST_SECONDS = 2.0


@contextmanager
def exit_on_signals() -> Iterator[None]:
    """End the process on the first signal by SystemExit, so that all blocks that are open clean up; exit code 128 + n.

    A second signal ends it at once.
    """
    received: list[int] = []

    def leave(number: int) -> None:
        received.append(number)
        sys.exit(exit_code_of(number))

    try:
        with _handling(leave):
            yield
    finally:
        if received:
            logger.info("stopped by %s; unfinished files are deleted", signal.Signals(received[0]).name)


@contextmanager
def stop_signals() -> Iterator[Callable[[], int]]:
    """Record the first signal instead of acting on it, and yield a function that returns its number, or 0.

    A second signal ends the process at once.
    """
    received: list[int] = []
    with _handling(received.append):
        yield lambda: received[0] if received else 0


@contextmanager
def _handling(act: Callable[[int], object]) -> Iterator[None]:
    """Call `act` with the number of the first signal."""
    received_at: list[float] = []

    def handle(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not received_at:
            received_at.append(now)
            act(number)
        elif now - received_at[0] > SAME_REQUEST_SECONDS:
            os._exit(exit_code_of(number))

    previous: dict[int, Any] = {number: signal.signal(number, handle) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
