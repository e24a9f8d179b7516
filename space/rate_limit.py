"""Limit how many messages each visitor sends."""

import time
from collections import deque
from threading import Lock


class Visitors:
    """Counts each visitor's messages of the last minute, and forgets visitors without any."""

    def __init__(self, messages_per_minute: int) -> None:
        self.messages_per_minute = messages_per_minute
        self._times: dict[str, deque[float]] = {}
        self._lock = Lock()

    def admit(self, visitor: str) -> None:
        """Count one more message.

        Raises:
            ValueError: it exceeds the limit; the message says how long to wait.
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
