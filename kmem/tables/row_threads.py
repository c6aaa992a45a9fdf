"""Host threads that share the rows of one loop. The compiled loops release the interpreter lock."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

_LEAST_VALUES = 1 << 14
"""Rows of fewer values than this together are not worth handing to another thread."""


class RowThreads:
    """Runs loops over rows in slices; rows are independent, so the number of threads changes no result.

    Args:
        threads: their number.
        dim: values of a row.
    """

    def __init__(self, threads: int = 1, dim: int = 64) -> None:
        assert threads >= 1
        self._least = max(1, _LEAST_VALUES // max(1, dim))
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, "kmem-rows") if threads > 1 else None

    def run(self, count: int, work: Callable[[slice], object]) -> None:
        """Call `work` on consecutive slices of [0, count), one per thread; raises what they raise."""
        parts = min(self._threads, max(1, count // self._least))
        if parts == 1 or self._pool is None:
            work(slice(0, count))
            return
        edges = [count * number // parts for number in range(parts + 1)]
        list(self._pool.map(work, [slice(a, b) for a, b in pairwise(edges)]))

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
