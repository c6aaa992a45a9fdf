"""One thread per rank that does all work on tables: deduplication, gathers, collectives, optimizer steps.

If two threads issue collectives of one group, the collectives do not deadlock but mix up their data. So the main thread
only queues jobs and waits. Jobs run in the order in which they were queued, which depends on the step alone and is
therefore the same on all ranks.
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
    """Runs jobs one after another. After the first error, every later job fails with the same error: nothing may wait
    for a job that will never run, and no rank may issue collectives that other ranks no longer expect.

    Args:
        exchange: the collectives of this rank's tables.
        timeout_seconds: longest wait for a job; must exceed the group's own timeout.
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
        """A future that a later job will resolve. It fails like the future of a job."""
        future: Future = Future()
        with self._lock:
            if self.error is None:
                self._promises.add(future)
                future.add_done_callback(self._promises.discard)
            else:
                future.set_exception(self._failure())
        return future

    def wait(self, future: Future) -> Any:
        """Wait for a job's result.

        Raises:
            ExchangeError: this or an earlier job failed, or the timeout has passed.
        """
        try:
            return future.result(self.timeout_seconds)
        except FutureTimeout:
            self.error = self.error or TimeoutError(f"no answer within {self.timeout_seconds:g} s")
            raise ExchangeError(_stopped(self.error)) from self.error

    def call(self, job: Callable[[], Any]) -> Any:
        """Queue a job and wait for its result. Everything queued before it is then done, too."""
        return self.wait(self.submit(job))

    def fail(self, error: BaseException) -> None:
        """Fail everything queued and everything later; the first error is kept."""
        with self._lock:
            self.error = self.error or error
            broken = list(self._promises)
        for promise in broken:
            with contextlib.suppress(InvalidStateError):  # the worker has just resolved it
                promise.set_exception(self._failure())

    def close(self) -> None:
        """Finish the queued jobs and end the thread. After an error, do not wait for it: it may be stuck."""
        if not self._closed:
            self._closed = True
            self._jobs.put(None)
            self._thread.join(self.timeout_seconds if self.error is None else 1.0)

    def _serve(self) -> None:
        # For this thread only: a second OpenMP team would spin beside the main thread's team and take its cores.
        torch.set_num_threads(1)
        while (item := self._jobs.get()) is not None:
            future, job = item
            if self.error is None:
                try:
                    future.set_result(job())
                    continue
                except BaseException as error:
                    # Log at once, on this rank: the other ranks only see a closed connection.
                    log.error("tables: %s: %s", type(error).__name__, error)
                    self.fail(error)
            future.set_exception(self._failure())

    def _failure(self) -> ExchangeError:
        failure = ExchangeError(_stopped(self.error))
        failure.__cause__ = self.error
        return failure


class InlineWorker:
    """Does the work at once, in the calling thread, with an exchange of its own."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self.error: BaseException | None = None

    def submit(self, job: Callable[[], Any]) -> Future:
        future: Future = Future()
        future.set_result(
            self.call(job)
        )  # raises here: a promise that the job should have resolved would hide the error
        return future

    def promise(self) -> Future:
        return Future()

    def wait(self, future: Future) -> Any:
        return future.result(0)

    def call(self, job: Callable[[], Any]) -> Any:
        """Do the job.

        Raises:
            ExchangeError: another rank is gone.
        """
        try:
            return job()
        except RuntimeError as error:  # as torch.distributed's errors are
            raise ExchangeError(_stopped(error)) from error

    def fail(self, error: BaseException) -> None:
        self.error = self.error or error


def _stopped(error: BaseException | None) -> str:
    return (
        f"tables: the exchange between ranks stopped ({type(error).__name__}: {error}); the log of the rank that "
        "failed first names the cause; the last checkpoint is intact"
    )
