"""Computing with one thread in a process that has several: the rounding of matrix products depends on the number of
threads. Ships beside exported weights."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")

_starting = threading.Lock()
_worker: tuple[int, ThreadPoolExecutor] | None = None


def with_one_thread(compute: Callable[[], Result]) -> Result:
    """The result of `compute()`, run with a single CPU thread of torch. Concurrent calls run one after another.

    It runs in a worker thread that is kept for this. `torch.set_num_threads` applies to the calling thread, and for
    good to every thread that first uses torch while it is set. So setting it to 1 and back around a computation would
    slow down threads that start meanwhile, and change their results in the last bits.
    """
    if torch.get_num_threads() == 1:
        return compute()
    return _kept().submit(compute).result()


def _kept() -> ThreadPoolExecutor:
    global _worker
    with _starting:
        if _worker is None or _worker[0] != os.getpid():  # a forked process has none of its parent's threads
            worker = ThreadPoolExecutor(1, "one-thread")
            threads = worker.submit(_take_one).result()
            # A thread that ends at once restores the number for new threads.
            with ThreadPoolExecutor(1) as other:
                other.submit(torch.set_num_threads, threads).result()
            _worker = os.getpid(), worker
        return _worker[1]


def _take_one() -> int:
    """Set the number of torch's threads for this thread to 1; returns the number that a new thread gets."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    return threads
