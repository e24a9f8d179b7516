"""Retry transient network errors with exponential backoff: one policy for datasets and the Hub.

An error is transient if the same call may succeed later: a connection that broke, a timeout, the statuses 408, 412 (the
branch moved on while a commit was made), 429 and 500 or more, or a file that ended early. The waits double from half a
second: a request of `REQUEST` attempts gives up after 16 seconds of waiting, a stream of `STREAM` attempts after two
minutes. Everything else, such as a missing file, a refused token or a full disk, is raised at once.
"""

import errno
import gzip
import logging
import lzma
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import TypeVar

import pyarrow
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled  # type: ignore[attr-defined]

from fgpt_hf.errors import UserError, first_line

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

CUT_SHORT = (pyarrow.ArrowInvalid, EOFError, zlib.error, lzma.LZMAError)
READ_ERRORS = (OSError, HTTPError, UnicodeDecodeError, *CUT_SHORT)
FIRST_WAIT_SECONDS = 0.5
MAX_ATTEMPTS_IF_DAMAGED = 3  # a file that ends early is sometimes the network's fault, but mostly its own
TRANSIENT_STATUSES = {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.PRECONDITION_FAILED, HTTPStatus.TOO_MANY_REQUESTS}
LASTING_ERRORS = (
    *(FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError),
    *(OfflineModeIsEnabled, UnicodeDecodeError, gzip.BadGzipFile),
)
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}


@dataclass(frozen=True)
class RetryPolicy:
    """How many calls in a row may fail before the last error is raised."""

    attempts: int

    def seconds_before(self, attempt: int) -> float:
        """Return how long to wait before an attempt, counted from 1.

        Example:
            >>> [RetryPolicy(4).seconds_before(attempt) for attempt in (2, 3, 4)]
            [0.5, 1.0, 2.0]
        """
        return FIRST_WAIT_SECONDS * 2.0 ** (attempt - 2)


ONCE = RetryPolicy(1)
REQUEST = RetryPolicy(6)  # the name may be wrong, or the machine offline: nobody wants to wait long for that answer
STREAM = RetryPolicy(9)  # hours of work may depend on it


class Attempts:
    """The attempts at one thing: counts the failures in a row, and waits longer after each."""

    def __init__(self, what: str, policy: RetryPolicy) -> None:
        self.what, self.policy, self.failures = what, policy, 0

    def succeeded(self) -> None:
        """Forget earlier failures."""
        self.failures = 0

    def failed(self, error: Exception) -> None:
        """Wait before the next attempt, or raise the error if it is not transient or the policy allows no more."""
        self.failures += 1
        attempts = min(self.policy.attempts, MAX_ATTEMPTS_IF_DAMAGED) if _is_damage(error) else self.policy.attempts
        if not is_transient(error) or self.failures >= attempts:
            raise error
        seconds = self.policy.seconds_before(self.failures + 1)
        logger.warning("%s: %s; trying again in %g s", self.what, first_line(error), seconds)
        time.sleep(seconds)


def retry(what: str, call: Callable[[], Result], policy: RetryPolicy = REQUEST) -> Result:
    """Return the result of `call`, which is called again after transient errors.

    Args:
        what: the name of what is read or written, for the warnings.

    Raises:
        Exception: an error that is not transient, or that of the last attempt, unchanged.

    Example:
        >>> retry("the number", lambda: 42)
        42
    """
    attempts = Attempts(what, policy)
    while True:
        try:
            return call()
        except Exception as error:
            attempts.failed(error)


def is_transient(error: Exception) -> bool:
    """Return whether the same call may succeed later.

    Example:
        >>> is_transient(ConnectionResetError()), is_transient(FileNotFoundError())
        (True, False)
    """
    if type(error) is RuntimeError and isinstance(error.__cause__, Exception):  # of the upload of a large file
        error = error.__cause__
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return status in TRANSIENT_STATUSES or status >= HTTPStatus.INTERNAL_SERVER_ERROR
    return isinstance(error, READ_ERRORS) and not isinstance(error, LASTING_ERRORS) and not _is_disk_error(error)


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Convert errors of reading `what` to a UserError that names it; an error of a full disk stays what it is.

    Example:
        >>> with reading("shard 3"):
        ...     raise ConnectionError("the line is down")
        Traceback (most recent call last):
            ...
        fgpt_hf.errors.UserError: shard 3 cannot be read: the line is down
    """
    try:
        yield
    except READ_ERRORS as error:
        if _is_disk_error(error):
            raise
        damage = "; it may be damaged or cut short" if _is_damage(error) else ""
        raise UserError(f"{what} cannot be read{damage}: {first_line(error)}") from error


def _is_damage(error: Exception) -> bool:
    """Return whether the content is at fault rather than its reading; pyarrow and bz2 have a plain OSError for that."""
    return isinstance(error, CUT_SHORT) or (type(error) is OSError and error.errno is None)


def _is_disk_error(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in DISK_ERRORS
