"""Work beside the main thread: processes that end with the one that started them, iterators that run ahead."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from queue import Full, Queue
from threading import Event, Thread
from types import ModuleType
from typing import TypeVar

Item = TypeVar("Item")


def process_pool(workers: int, initializer: Callable[[], object] | None = None) -> ProcessPoolExecutor:
    """Return a pool of processes, all of them starting.

    They are spawned, because a forked child of a process that already runs torch's threads may hang.
    """
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_begin, initargs=(initializer,))
    with _hidden_main():
        for _ in range(workers):
            pool.submit(int)  # starts one, as none is idle yet
    return pool


def in_background(items: Generator[Item, None, None], ahead: int) -> Iterator[Item]:
    """The same items, up to `ahead` of them made by a thread before they are asked for; its errors are raised here."""
    ready: Queue[tuple[bool, Item | BaseException | None]] = Queue(ahead)
    abandoned = Event()

    def hand_over(last: bool, value: Item | BaseException | None) -> None:
        while not abandoned.is_set():
            try:
                return ready.put((last, value), timeout=0.1)
            except Full:
                continue

    def make() -> None:
        try:
            for item in items:
                hand_over(False, item)
                if abandoned.is_set():
                    return
            hand_over(True, None)
        except BaseException as error:
            hand_over(True, error)
        finally:
            items.close()

    Thread(target=make, daemon=True).start()
    try:
        while True:
            last, value = ready.get()
            if isinstance(value, BaseException):
                raise value
            if last:
                return
            yield value  # type: ignore[misc]
    finally:
        abandoned.set()


@contextmanager
def _hidden_main() -> Iterator[None]:
    """Keep spawned workers from running the caller's script again, whose import of torch would take them seconds."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _begin(initializer: Callable[[], object] | None) -> None:
    Thread(target=_end_with_parent, daemon=True).start()
    if initializer:
        initializer()


def _end_with_parent() -> None:
    """Leave when the parent is gone, however it went: a worker that waits for work would wait for ever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
