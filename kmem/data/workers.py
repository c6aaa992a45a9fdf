"""Worker processes that return results in order and never outlive their parent, however it ends."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Self, TypeVar

from kmem.config import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Workers:
    """`count` worker processes, or this process alone if `count` is 1. A context manager."""

    def __init__(self, count: int):
        self._count = count
        self._executor: ProcessPoolExecutor | None = None
        self._others = set(multiprocessing.active_children())

    def __enter__(self) -> Self:
        if self._count > 1:
            # Spawned: a fork of a process with threads (tokenizers, PyTorch) may hang.
            context = multiprocessing.get_context("spawn")
            self._executor = ProcessPoolExecutor(self._count, mp_context=context, initializer=_begin)
        return self

    def in_order(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Apply `function` to each item and yield results in the order of the items; a few items per worker are read
        ahead.

        Raises:
            UserError: a worker process died.
        """
        if self._executor is None:
            yield from map(function, items)
            return
        pending: deque[Future[Result]] = deque()
        try:
            for item in items:
                pending.append(self._executor.submit(function, item))
                if len(pending) >= 3 * self._count:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed, perhaps for lack of host memory; free some, or use fewer --workers if "
                "the command has that option"
            ) from None

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        if self._executor is None:
            return
        if kind is not None:
            for child in set(multiprocessing.active_children()) - self._others:
                child.terminate()
        self._executor.shutdown(wait=True, cancel_futures=True)


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread per worker
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        # A parent that is killed does not close the queue, so workers would wait for work forever.
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
