"""Row optimizers and gathers on the host against torch's, in one process on one table."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numba
import numpy as np
import torch

from kmem.bench.machine import processor
from kmem.config import RowOptimizerConfig
from kmem.tables.row_optimizers import RowUpdate, kernels, make_row_optimizer
from kmem.tables.row_threads import RowThreads
from kmem.tables.segments import Segments
from kmem.tables.stores import ArrayLayout, Store


@dataclass(frozen=True)
class RowRates:
    """Millions of rows per second of both sides, the best of the repeats."""

    ours: float
    torch: float

    @property
    def ratio(self) -> float:
        return self.ours / self.torch


def adam_rates(rows: int, touched: int, dim: int = 256, threads: int = 1, repeats: int = 5) -> RowRates:
    """Lazy Adam on random fp32 rows against `torch.optim.SparseAdam`.

    Both get the same gradients of `touched` look-ups of uniformly drawn rows. Some rows are repeated, so both
    deduplicate and sum. `threads` is for kmem; torch uses as many as `torch.set_num_threads` allows.
    """
    generator = np.random.default_rng(0)
    ids = generator.integers(0, rows, touched)
    gradients = generator.standard_normal((touched, dim), dtype=np.float32)

    optimizer = make_row_optimizer(RowOptimizerConfig(name="lazy_adam"), dim, 0, "bench", RowThreads(threads))
    store = Store("host", rows, {"rows": ArrayLayout(dim, torch.float32), **optimizer.state()})
    for name in store.arrays:
        store[name].fill_(0.1)
    step = 0

    def ours() -> None:
        nonlocal step
        step += 1
        optimizer.apply(store, RowUpdate(Segments.of(ids), gradients, 1.0, step, 1e-3), 0)

    weight = torch.nn.Parameter(torch.full((rows, dim), 0.1))
    peer = torch.optim.SparseAdam([weight], lr=1e-3)

    def torchs() -> None:
        weight.grad = torch.sparse_coo_tensor(
            torch.from_numpy(ids)[None], torch.from_numpy(gradients), weight.shape, check_invariants=False
        )
        peer.step()

    our_seconds, torch_seconds = _in_turn(repeats, ours, torchs)
    return RowRates(touched / our_seconds / 1e6, touched / torch_seconds / 1e6)


def update_rate(rows: int, touched: int, settings: RowOptimizerConfig, dtype: torch.dtype, dim: int = 256) -> float:
    """Millions of rows per second on one core for the update alone: rows are unique, gradients already summed."""
    optimizer = make_row_optimizer(settings, dim, 0, "bench")
    store = Store("host", rows, {"rows": ArrayLayout(dim, dtype), **optimizer.state()})
    for name, array in store.arrays.items():
        array.fill_(0 if name == "last_step" else 0.1)
    generator = np.random.default_rng(0)
    gradients = generator.standard_normal((touched, dim), dtype=np.float32)
    step, unique = 0, Segments.distinct(np.sort(generator.choice(rows, touched, replace=False)))

    def update() -> None:
        nonlocal step
        step += 1
        optimizer.apply(store, RowUpdate(unique, gradients, 1.0, step, 1e-3), 0)

    (seconds,) = _in_turn(5, update)
    return touched / seconds / 1e6


def gather_rates(rows: int, touched: int, dim: int = 256, threads: int = 1, repeats: int = 5) -> RowRates:
    """kmem's gather with `threads` threads against `index_select(out=)` with one thread; fp32 rows."""
    table = torch.full((rows, dim), 0.1)
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, rows, touched))
    out, pool = torch.zeros(touched, dim), RowThreads(threads)

    def ours() -> None:
        pool.run(
            touched,
            lambda part: kernels.gather(table.numpy(), np.uintp(0), ids[part].numpy(), out[part].numpy()),
        )

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        our_seconds, torch_seconds = _in_turn(repeats, ours, lambda: torch.index_select(table, 0, ids, out=out))
    finally:
        torch.set_num_threads(before)
    return RowRates(touched / our_seconds / 1e6, touched / torch_seconds / 1e6)


def versions() -> str:
    """Versions and processor that the figures were measured with."""
    return f"torch {torch.__version__}, numba {numba.__version__}, numpy {np.__version__}, {processor()}"


def _in_turn(repeats: int, *works: Callable[[], object]) -> list[float]:
    """Shortest time of each work in seconds. They run in turn after one unmeasured call, so a drift of the machine's
    speed affects all of them."""
    best = [float("inf")] * len(works)
    for number in range(repeats + 1):
        for place, work in enumerate(works):
            began = time.perf_counter()
            work()
            if number:
                best[place] = min(best[place], time.perf_counter() - began)
    return best
