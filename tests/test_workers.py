"""Work beside the main thread ends with what started it, and its errors are raised in the main thread."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing

import psutil
import pytest

from fgpt_hf.config.data_options import TextSource
from fgpt_hf.data.splits import SPLITS, ValidationRule
from fgpt_hf.data.stream import TokenizerPool
from fgpt_hf.workers import BackgroundIterator

POOL = """
import time
from fgpt_hf.workers import process_pool
if __name__ == "__main__":
    pool = process_pool(2)
    pool.submit(time.sleep, 1000)
    print("ready", flush=True)
    time.sleep(1000)
"""


def until(condition: Callable[[], bool], seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


@pytest.mark.slow
def test_workers_end_when_the_process_that_started_them_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", POOL], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == "ready\n"
        process = psutil.Process(parent.pid)
        assert until(lambda: len(process.children()) >= 2)
        children = process.children()
        parent.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive


GROUP = """
import os, signal, sys, time
from fgpt_hf.workers import process_pool
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: None)
if __name__ == "__main__":
    pool = process_pool(2)
    sent = [os.killpg(0, number) for _ in range(2) for number in (signal.SIGINT, signal.SIGTERM)]  # while they start
    assert pool.submit(abs, -5).result() == 5
    sent += [os.killpg(0, number) for number in (signal.SIGINT, signal.SIGTERM)]
    time.sleep(0.2)
    assert pool.submit(abs, -6).result() == 6
    pool.shutdown()
"""


@pytest.mark.slow
def test_workers_outlive_signals_to_the_whole_group_and_write_no_traceback() -> None:
    """As Ctrl-C and schedulers send them: the process that needs their work is about to save."""
    done = subprocess.run([sys.executable, "-c", GROUP], start_new_session=True, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_worker_that_reads_sources_and_tokenizes_loads_no_torch() -> None:
    """It would take each worker seconds and hundreds of megabytes."""
    with closing(TokenizerPool(TextSource(), workers=1, in_processes=True)) as pool:
        texts, rule = ["Once upon a time"], ValidationRule(0.5)
        encoded = pool.executor.submit(pool._encode, texts, rule, SPLITS, repeats=1.0).result()
        pool.executor.submit(eval, "__import__('fgpt_hf.data.pydocs') and None").result()
        loaded = set(pool.executor.submit(eval, "list(__import__('sys').modules)").result())
    assert sum(len(ids) for documents in encoded.values() for ids in documents) > 0
    assert "fgpt_hf.data.pydocs" in loaded and not {"torch", "transformers", "datasets"} & loaded


def test_items_come_in_order_and_then_the_end() -> None:
    ahead = BackgroundIterator((n * n for n in range(100)), ahead=3)
    assert list(ahead) == [n * n for n in range(100)]
    assert list(ahead) == []


def test_only_so_many_items_are_made_ahead() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for n in range(100):
            made.append(n)
            yield n

    ahead = BackgroundIterator(items(), ahead=3)  # type: ignore[var-annotated]
    assert next(ahead) == 0
    assert until(lambda: len(made) == 4)  # one taken, three ready
    time.sleep(0.1)
    assert len(made) == 4


def test_an_error_is_raised_where_the_items_are_used() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("no more")

    ahead = BackgroundIterator(items(), ahead=1)  # type: ignore[var-annotated]
    assert next(ahead) == 1
    for _ in range(2):
        with pytest.raises(ValueError, match="no more"):
            next(ahead)


def test_the_thread_ends_when_its_iterator_is_garbage_collected() -> None:
    closed = threading.Event()

    def items() -> Iterator[int]:
        try:
            while True:
                yield os.getpid()
        finally:
            closed.set()

    ahead = BackgroundIterator(items(), ahead=1)  # type: ignore[var-annotated]
    next(ahead)
    del ahead
    gc.collect()
    assert closed.wait(30)


def test_a_closed_iterator_has_ended() -> None:
    ahead = BackgroundIterator((n for n in range(100)), ahead=2)
    assert next(ahead) == 0
    ahead.close()
    assert list(ahead) == []
