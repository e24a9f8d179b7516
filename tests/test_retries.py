"""What may pass by itself is tried again, with growing waits; everything else is raised at once."""

import errno
import logging
from collections.abc import Callable, Iterator
from gzip import BadGzipFile

import pyarrow
import pytest
from httpx2 import ConnectTimeout, Request, Response
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from fgpt_hf.retries import REQUEST, STREAM, RetryPolicy, is_transient, reading, retry


def answer(status: int) -> HfHubHTTPError:
    return HfHubHTTPError("the answer", response=Response(status, request=Request("GET", "http://127.0.0.1/")))


TRANSIENT = [
    *(answer(status) for status in (408, 412, 429, 500, 502, 503, 504)),
    ConnectTimeout("slow"),
    ConnectionResetError(errno.ECONNRESET, "reset"),
    TimeoutError(),
    pyarrow.ArrowInvalid("cut"),
    OSError("unexpected end of stream"),
    EOFError("Compressed file ended"),
]
LASTING = [
    *(answer(status) for status in (400, 401, 403, 404, 409)),
    FileNotFoundError("gone"),
    PermissionError("no"),
    OfflineModeIsEnabled("offline"),
    OSError(errno.ENOSPC, "No space left on device"),
    BadGzipFile("no gzip"),
    UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "unexpected end of data"),
    ValueError("wrong"),
    KeyError("a bug"),
]


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the waits, which take no time."""
    found: list[float] = []
    monkeypatch.setattr("fgpt_hf.retries.time.sleep", found.append)
    return found


def failing(*errors: Exception) -> tuple[Callable[[], str], Iterator[Exception]]:
    """Return a call that raises each error once and then answers, and the errors that it has left."""
    left = iter(errors)

    def call() -> str:
        for error in left:
            raise error
        return "answer"

    return call, left


@pytest.mark.parametrize("error", TRANSIENT, ids=repr)
def test_transient_errors_are_tried_again(error: Exception, waits: list[float]) -> None:
    assert is_transient(error)
    call, _ = failing(error, error)
    assert retry("it", call) == "answer" and waits == [0.5, 1.0]


@pytest.mark.parametrize("error", LASTING, ids=repr)
def test_other_errors_are_raised_at_once(error: Exception, waits: list[float]) -> None:
    assert not is_transient(error)
    call, left = failing(error, KeyError("a second call"))
    with pytest.raises(type(error)) as raised:
        retry("it", call)
    assert raised.value is error and waits == [] and next(left)


def test_the_last_error_is_raised_when_the_attempts_are_used_up(waits: list[float]) -> None:
    call, left = failing(*(ConnectionError(str(number)) for number in range(10)))
    with pytest.raises(ConnectionError, match="3"):
        retry("it", call, RetryPolicy(4))
    assert waits == [0.5, 1.0, 2.0] and len(list(left)) == 6


def test_the_policies_wait_as_long_as_the_module_says(waits: list[float]) -> None:
    for policy, seconds in ((REQUEST, 15.5), (STREAM, 127.5)):
        waits.clear()
        with pytest.raises(ConnectionError):
            retry("it", failing(*[ConnectionError()] * 20)[0], policy)
        assert sum(waits) == seconds


def test_damaged_content_is_read_three_times_at_most(waits: list[float]) -> None:
    with pytest.raises(pyarrow.ArrowInvalid):
        retry("it", failing(*[pyarrow.ArrowInvalid("cut")] * 20)[0], STREAM)
    assert len(waits) == 2


def test_each_wait_is_logged(waits: list[float], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "fgpt_hf"):
        retry("shard 3", failing(ConnectionError("the line is down\nand more"))[0])
    assert caplog.messages == ["shard 3: the line is down; trying again in 0.5 s"] and waits == [0.5]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("the line is down\nand more"), "^shard 3 cannot be read: the line is down$"),
        (pyarrow.ArrowInvalid("cut"), "^shard 3 cannot be read; it may be damaged or cut short: cut$"),
        (answer(403), "^shard 3 cannot be read: the answer"),
    ],
)
def test_errors_of_reading_name_what_was_read(error: Exception, message: str) -> None:
    with pytest.raises(ValueError, match=message), reading("shard 3"):
        raise error


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyError("a bug")])
def test_a_full_disk_and_a_bug_are_not_errors_of_reading(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, reading("shard 3"):
        raise error
    assert raised.value is error
