"""One thread per rank that does all work on tables: dedup, gathers, collectives, optimizer steps.

Collectives of one group issued by two threads do not deadlock, they mix up their data. So the main thread only queues
jobs and waits; jobs run in the order in which they were queued, a function of the step and so equal on all ranks.
"""

import contextlib
import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any

import torch

from kmem.tables.exchange import Exchange, ExchangeError

log = logging.getLogger(__name__)


class TableWorker:
    """Runs jobs one after another. After the first error every later job fails with it: none may wait for a job that
    nobody will do, and no rank may issue collectives that others no longer expect.

    Args:
        exchange: the collectives of this rank's tables.
        timeout_seconds: longest wait for a job; above the group's own timeout.
    """

    def __init__(self, exchange: Exchange | None = None, timeout_seconds: float = 300.0) -> None:
        self.exchange = exchange or Exchange()
        self.timeout_seconds = timeout_seconds
        self.error: BaseException | None = None
        self._jobs: queue.SimpleQueue[tuple[Future, Callable[[], Any]] | None] = queue.SimpleQueue()
        self._promises: set[Future] = set()
        self._lock = threading.Lock()
        self._closed = False
        # A daemon: a thread stuck in a collective must not keep a failed process alive.
        self._thread = threading.Thread(target=self._serve, name="kmem-tables", daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], Any]) -> Future:
        """Queue a job. Its future fails with an ExchangeError once any job has failed."""
        assert not self._closed, "the worker is closed"
        future: Future = Future()
        self._jobs.put((future, job))
        return future

    def promise(self) -> Future:
        """A future that a later job will resolve; it fails like those of jobs."""
        future: Future = Future()
        with self._lock:
            if self.error is None:
                self._promises.add(future)
                future.add_done_callback(self._promises.discard)
            else:
                future.set_exception(self._failure())
        return future

    def wait(self, future: Future) -> Any:
        """The job's result.

        Raises:
            ExchangeError: this or an earlier job failed, or nothing came within the timeout.
        """
        try:
            return future.result(self.timeout_seconds)
        except FutureTimeout:
            self.error = self.error or TimeoutError(f"no answer within {self.timeout_seconds:g} s")
            raise ExchangeError(self._message()) from self.error

    def call(self, job: Callable[[], Any]) -> Any:
        """Queue a job and wait for it: everything queued before it is done then."""
        return self.wait(self.submit(job))

    def fail(self, error: BaseException) -> None:
        """Fail everything queued and everything later; the first error is kept."""
        with self._lock:
            self.error = self.error or error
            broken = list(self._promises)
        for promise in broken:
            with contextlib.suppress(InvalidStateError):  # resolved in this moment
                promise.set_exception(self._failure())

    def close(self) -> None:
        """Finish what is queued and end the thread; after an error leave it, it may never come back."""
        if not self._closed:
            self._closed = True
            self._jobs.put(None)
            self._thread.join(self.timeout_seconds if self.error is None else 1.0)

    def _serve(self) -> None:
        # Of this thread: an OpenMP team of its own would spin beside the main thread's and take its cores.
        torch.set_num_threads(1)
        while (item := self._jobs.get()) is not None:
            future, job = item
            if self.error is None:
                try:
                    future.set_result(job())
                    continue
                except BaseException as error:
                    # Logged at once, on this rank: its peers only see a closed connection.
                    log.error("tables: %s: %s", type(error).__name__, error)
                    self.fail(error)
            future.set_exception(self._failure())

    def _failure(self) -> ExchangeError:
        failure = ExchangeError(self._message())
        failure.__cause__ = self.error
        return failure

    def _message(self) -> str:
        return (
            f"tables: the exchange between ranks stopped ({type(self.error).__name__}: {self.error}); "
            "the log of the rank that failed first names the cause, the last checkpoint is unharmed"
        )
