"""Work beside the main thread: processes that end with the one that started them, iterators that run ahead."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from multiprocessing import get_context, parent_process
from queue import Full, Queue
from threading import Event, Thread
from types import ModuleType
from typing import NoReturn, TypeVar

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


class InBackground(Iterator[Item]):
    """The same items, made by a thread that runs up to `ahead` of them ahead; its errors are raised here.

    The thread begins at once, and stops when nobody holds this any more.
    """

    def __init__(self, items: Generator[Item, None, None], ahead: int) -> None:
        self._ready: Queue[Callable[[], Item]] = Queue(ahead)
        self._abandoned = Event()
        Thread(target=_make, args=(items, self._ready, self._abandoned), daemon=True).start()

    def __next__(self) -> Item:
        return self._ready.get()()

    def __del__(self) -> None:
        self._abandoned.set()


def _make(items: Generator[Item, None, None], ready: Queue[Callable[[], Item]], abandoned: Event) -> None:
    """Put each item, and then the error or the end, as a call that returns or raises it."""
    with closing(items):
        last = False
        while not (last or abandoned.is_set()):
            try:
                result: Callable[[], Item] = partial(_return, next(items))
            except BaseException as error:
                last, result = True, partial(_raise, error)
            _put(result, ready, abandoned)


def _put(result: Callable[[], Item], ready: Queue[Callable[[], Item]], abandoned: Event) -> None:
    while not abandoned.is_set():
        try:
            return ready.put(result, timeout=0.1)
        except Full:
            continue


def _return(item: Item) -> Item:
    return item


def _raise(error: BaseException) -> NoReturn:
    raise error


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
