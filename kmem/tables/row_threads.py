"""Host threads that share the rows of one loop. Compiled loops release the interpreter lock."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

_LEAST_VALUES = 1 << 14
"""A thread gets rows with at least this many values together; fewer are not worth the hand-over."""


class RowThreads:
    """Runs loops over slices of rows. Rows are independent, so the number of threads changes no result.

    Args:
        threads: number of threads.
        dim: number of values per row.
    """

    def __init__(self, threads: int = 1, dim: int = 64) -> None:
        assert threads >= 1
        self._least = max(1, _LEAST_VALUES // max(1, dim))
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, "kmem-rows") if threads > 1 else None

    def run(self, count: int, work: Callable[[slice], object]) -> None:
        """Call `work` on consecutive slices of [0, count), one per thread; re-raises its exceptions."""
        parts = min(self._threads, max(1, count // self._least))
        if parts == 1 or self._pool is None:
            work(slice(0, count))
            return
        edges = [count * number // parts for number in range(parts + 1)]
        list(self._pool.map(work, [slice(a, b) for a, b in pairwise(edges)]))

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
