"""Patience with a network: what may pass by itself, and how long to wait for it."""

import logging
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import TypeVar

import pyarrow
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

from fgpt_hf.errors import UserError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

FIRST_WAIT_SECONDS = 0.5  # doubled with every failure in a row
MOST_FAILURES = 9  # in a row: four minutes
MOST_DAMAGED = 3  # a file that ends early is now and then the network's fault, but mostly its own
PASSING_STATUS = {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS}
MOST_FAILURES_AT_FIRST = 6  # of a name that may be wrong, or without any network: a quarter of a minute
LASTING_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, OfflineModeIsEnabled)


class RetryPolicy:
    """Counts the failures in a row of reading one thing over a network, and waits longer after each."""

    def __init__(self, what: str, most_failures: int = MOST_FAILURES) -> None:
        self.what, self.most_failures, self.failures = what, most_failures, 0

    def succeeded(self) -> None:
        self.failures = 0

    def wait(self, error: Exception) -> None:
        """Wait for the error to pass.

        Raises:
            UserError: it will not pass by itself, or there were too many in a row.
        """
        self.failures += 1
        most_failures = min(self.most_failures, MOST_DAMAGED) if _is_damage(error) else self.most_failures
        if not is_transient(error) or self.failures >= most_failures:
            raise unreadable(self.what, error) from error
        seconds = FIRST_WAIT_SECONDS * 2 ** (self.failures - 1)
        logger.warning("%s: %s; trying again in %g s", self.what, _first_line(error), seconds)
        time.sleep(seconds)


def retry(what: str, call: Callable[[], Result]) -> Result:
    """What `call` returns, tried again after errors that may pass; others are raised as they are."""
    patience = RetryPolicy(what, MOST_FAILURES_AT_FIRST)
    while True:
        try:
            return call()
        except Exception as error:
            if not is_transient(error):
                raise
            patience.wait(error)


def is_transient(error: Exception) -> bool:
    """Whether the same request may succeed later: the network's or the server's trouble, or an answer cut short."""
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return status in PASSING_STATUS or status >= HTTPStatus.INTERNAL_SERVER_ERROR
    if isinstance(error, LASTING_ERRORS):
        return False
    return isinstance(error, (OSError, HTTPError, pyarrow.ArrowInvalid))


def unreadable(what: str, error: Exception) -> UserError:
    """The error to raise when `what` cannot be read, now or ever."""
    damage = "; it may be damaged or cut short" if _is_damage(error) else ""
    return UserError(f"{what} cannot be read{damage}: {_first_line(error)}")


def _is_damage(error: Exception) -> bool:
    """Whether it is about what was read rather than about reading it: pyarrow has two errors for that."""
    return isinstance(error, pyarrow.ArrowInvalid) or (type(error) is OSError and error.errno is None)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).split("\n")[0]
