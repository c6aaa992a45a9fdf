"""Row optimizers and gathers on the host against torch's, in one process on one table."""

import itertools
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from kmem.bench.contest import in_turn
from kmem.bench.machine import torch_threads
from kmem.config import RowOptimizerConfig
from kmem.tables.row_optimizers import RowUpdate, kernels, make_row_optimizer
from kmem.tables.row_threads import RowThreads
from kmem.tables.segments import Segments
from kmem.tables.stores import ArrayLayout, Store


def adam_rates(rows: int, touched: int, dim: int, threads: int, repeats: int) -> list[float]:
    """Lazy Adam on random fp32 rows against `torch.optim.SparseAdam`.

    Both get the same gradients of `touched` look-ups of uniformly drawn rows. Some rows are repeated, so both
    deduplicate and sum.

    Returns:
        Millions of rows per second of kmem and of torch, both with `threads` threads, the best of the repeats.
    """
    generator = np.random.default_rng(0)
    ids = generator.integers(0, rows, touched)
    gradients = generator.standard_normal((touched, dim), dtype=np.float32)

    update = _updates(rows, RowOptimizerConfig(name="lazy_adam"), torch.float32, dim, RowThreads(threads))
    weight = torch.nn.Parameter(torch.full((rows, dim), 0.1))
    peer = torch.optim.SparseAdam([weight], lr=1e-3)

    def torchs() -> None:
        weight.grad = torch.sparse_coo_tensor(
            torch.from_numpy(ids)[None], torch.from_numpy(gradients), weight.shape, check_invariants=False
        )
        peer.step()

    with torch_threads(threads):
        return _rates(touched, repeats, lambda: update(Segments.of(ids), gradients), torchs)


def update_rate(rows: int, touched: int, settings: RowOptimizerConfig, dtype: torch.dtype, dim: int) -> float:
    """Millions of rows per second on one core for the update alone: rows are unique, gradients already summed."""
    generator = np.random.default_rng(0)
    gradients = generator.standard_normal((touched, dim), dtype=np.float32)
    unique = Segments.distinct(np.sort(generator.choice(rows, touched, replace=False)))
    update = _updates(rows, settings, dtype, dim)
    (rate,) = _rates(touched, 5, lambda: update(unique, gradients))
    return rate


def gather_rates(rows: int, touched: int, dim: int, threads: int, repeats: int) -> list[float]:
    """kmem's gather with `threads` threads against `index_select(out=)` with one thread; fp32 rows. Returns millions of
    rows per second of both, the best of the repeats."""
    table = torch.full((rows, dim), 0.1)
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, rows, touched))
    out, pool = torch.zeros(touched, dim), RowThreads(threads)

    def ours() -> None:
        pool.run(
            touched,
            lambda part: kernels.gather(table.numpy(), np.uintp(0), ids[part].numpy(), out[part].numpy()),
        )

    with torch_threads(1):
        return _rates(touched, repeats, ours, lambda: torch.index_select(table, 0, ids, out=out))


def _updates(
    rows: int, settings: RowOptimizerConfig, dtype: torch.dtype, dim: int, threads: RowThreads | None = None
) -> Callable[[Segments, NDArray[np.float32]], None]:
    """A function that applies gradients, each call as the next step, to the rows of a table on the host."""
    optimizer = make_row_optimizer(settings, dim, 0, "bench", threads)
    store = Store("host", rows, {"rows": ArrayLayout(dim, dtype), **optimizer.state()})
    for name, array in store.arrays.items():
        array.fill_(0 if name == "last_step" else 0.1)
    steps = itertools.count(1)
    return lambda ids, gradients: optimizer.apply(store, RowUpdate(ids, gradients, 1.0, next(steps), 1e-3), 0)


def _rates(touched: int, repeats: int, *works: Callable[[], object]) -> list[float]:
    """Millions of rows per second of each work, the best of the repeats."""
    return [touched / min(seconds) / 1e6 for seconds in in_turn(works, repeats)]
