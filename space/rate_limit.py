"""A limit for each visitor."""

import time
from collections import deque
from threading import Lock


class Visitors:
    """Counts what each visitor asked for within the last minute; who has asked for nothing since is forgotten."""

    def __init__(self, messages_per_minute: int) -> None:
        self.messages_per_minute = messages_per_minute
        self._asked: dict[str, deque[float]] = {}
        self._lock = Lock()

    def admit(self, visitor: str) -> None:
        """Count one message more.

        Raises:
            ValueError: it is one too many; says how long to wait.
        """
        now = time.monotonic()
        with self._lock:
            self._forget(now - 60)
            asked = self._asked.setdefault(visitor, deque())
            if len(asked) >= self.messages_per_minute:
                wait = asked[0] + 60 - now
                raise ValueError(
                    f"that is more than {self.messages_per_minute} messages a minute: try again in {wait:.0f} seconds"
                )
            asked.append(now)

    def _forget(self, before: float) -> None:
        for visitor, asked in list(self._asked.items()):
            while asked and asked[0] < before:
                asked.popleft()
            if not asked:
                del self._asked[visitor]
