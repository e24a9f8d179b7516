"""Work outside the main thread: processes that end with their parent, iterators that are read ahead, and checks.

Threads are enough for work that releases Python's lock (reading, tiktoken) and start at once. A spawned process takes
about a second to start and import what it needs, less than half of that without torch, and is worth it for minutes of
work in Python itself.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, contextmanager
from multiprocessing import get_context, parent_process
from queue import SimpleQueue
from threading import Event, Semaphore, Thread, Timer
from types import FrameType, ModuleType
from typing import Generic, TypeVar

Item = TypeVar("Item")

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE_SECONDS = 30.0  # what Slurm and torchrun give between SIGTERM and SIGKILL


def process_pool(workers: int, initializer: Callable[[], object] | None = None) -> ProcessPoolExecutor:
    """Return a pool of processes that start at once and end with this process, even if it is killed.

    They are spawned, because a forked child of a process that already runs torch's threads may hang. Ctrl-C and
    schedulers signal all processes at once: workers continue, because this process may need them for an orderly end.
    """
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start_worker, initargs=(initializer,))
    with _hidden_main(), _blocked_signals():
        for _ in range(workers):
            pool.submit(int)  # starts one, as none is idle yet
    return pool


class BackgroundIterator(Iterator[Item], Generic[Item]):
    """The items of a generator, made by a thread that is up to `ahead` items ahead of the caller.

    The thread starts at once, and ends when this iterator is closed or garbage-collected. Errors of the generator are
    raised here, after the items before them.

    Example:
        >>> squares = BackgroundIterator((n * n for n in range(4)), ahead=2)
        >>> list(squares)
        [0, 1, 4, 9]
    """

    def __init__(self, items: Generator[Item, None, None], ahead: int) -> None:
        self._made: SimpleQueue[Item | _End] = SimpleQueue()
        self._room, self._closed = Semaphore(ahead), Event()
        self._end: _End | None = None
        Thread(target=_make, args=(items, self._made, self._room, self._closed), daemon=True).start()

    def __next__(self) -> Item:
        made = self._end or self._made.get()
        self._room.release()
        if isinstance(made, _End):
            self._end = made
            raise made.error
        return made

    def close(self) -> None:
        """Let the thread end after the item that it is making."""
        self._end = self._end or _End(StopIteration())
        self._closed.set()
        self._room.release()

    def __del__(self) -> None:
        self.close()


class BackgroundCheck:
    """A check that a thread makes; what it raises is raised here, by the first `wait` after that.

    Example:
        >>> check = BackgroundCheck(lambda: None)
        >>> check.wait(seconds=1)
    """

    def __init__(self, check: Callable[[], object]) -> None:
        self._check = check
        self._error: BaseException | None = None
        self._thread = Thread(target=self._run, daemon=True)
        self._thread.start()

    def wait(self, seconds: float = 0) -> None:
        """Wait for the check, for at most `seconds`, and raise what it raised."""
        self._thread.join(seconds)
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._check()
        except BaseException as error:
            self._error = error


def exit_code_of(number: int) -> int:
    """Return the exit code of a process that a signal ended, as shells have it.

    Example:
        >>> exit_code_of(signal.SIGTERM)
        143
    """
    return 128 + number


class _End:
    """The error that ended a generator, StopIteration included."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


def _make(items: Generator[Item, None, None], made: SimpleQueue[Item | _End], room: Semaphore, closed: Event) -> None:
    """Put each item into `made` when there is room for it, and then the end. Holds no reference to the iterator."""
    with closing(items):
        while room.acquire() and not closed.is_set():
            try:
                made.put(next(items))
            except BaseException as error:
                made.put(_End(error))
                return


@contextmanager
def _hidden_main() -> Iterator[None]:
    """Keep spawned workers from running the caller's script again, whose import of torch would take them seconds."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextmanager
def _blocked_signals() -> Iterator[None]:
    """Start processes that are deaf to Ctrl-C and SIGTERM until `_start_worker` has said how to take them."""
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(initializer: Callable[[], object] | None) -> None:
    Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_later)
    if sys.platform != "win32":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    if initializer:
        initializer()


def _end_later(number: int, frame: FrameType | None) -> None:
    """End this process when its parent has had time to end before; the executor, too, ends what hangs in this way."""
    timer = Timer(GRACE_SECONDS, os._exit, [exit_code_of(number)])
    timer.daemon = True
    timer.start()


def _end_with_parent() -> None:
    """End this process when its parent is gone, even if killed: a worker that waits for work would wait forever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
