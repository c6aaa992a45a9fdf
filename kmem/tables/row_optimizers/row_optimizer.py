"""The shared part of all row optimizers: clipping, rounding, and the calls of compiled loops and kernels."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kmem.config import RowOptimizerConfig
from kmem.tables import counter_random
from kmem.tables.row_optimizers import kernels
from kmem.tables.row_optimizers.update import RowUpdate
from kmem.tables.row_threads import RowThreads
from kmem.tables.stores import ArrayLayout, Store

if TYPE_CHECKING:
    from kmem_kernels.row_update.op import Gradients, RandomRounding


# Shape letters: U rows of a step, D values of a row.


class RowOptimizer(ABC):
    """Updates rows and their state in place, with compiled loops for rows on the host and kernels for rows on a device.
    Both match the definition, `kmem_kernels.row_update.reference`.

    Args:
        settings: the user's choices.
        dim: number of values per row, D.
        seed: seed of the run; with `table` it seeds stochastic rounding.
        table: canonical name of the table.
        threads: host threads that share the rows of a step.
        sum_over_ranks: sums a small fp64 array over all ranks that share the table, in place.
        upload: copies host arrays to tensors on the device of the rows; default: tensors that share the arrays' memory.
    """

    collective = False
    """Whether every step sums over the ranks, so that ranks without rows must take part, too."""

    def __init__(
        self,
        settings: RowOptimizerConfig,
        dim: int,
        seed: int,
        table: str,
        threads: RowThreads | None = None,
        sum_over_ranks: Callable[[np.ndarray], None] = lambda _: None,
        upload: Callable[..., list[Tensor]] | None = None,
    ) -> None:
        self.settings, self.dim = settings, dim
        self._threads, self._sum = threads or RowThreads(), sum_over_ranks
        self._upload = upload or _same_storage
        self._stream = counter_random.key(seed, table, "rounding")

    @abstractmethod
    def state(self) -> dict[str, ArrayLayout]:
        """Name -> layout of the arrays that the optimizer keeps per row."""

    def apply(self, store: Store, update: RowUpdate, first_row: int) -> None:
        """Do one step. `first_row` is the number of the store's row 0 in the table. Collective over the ranks of the
        table if the settings clip or the optimizer is `collective`; then ranks without rows must call it, too."""
        if self.settings.clip_norm is not None:
            update = self._clipped(update.summed())
        if len(update.rows) or self.collective:
            (self._on_host if store.on_host else self._on_device)(store, update, first_row)

    @abstractmethod
    def _on_host(self, store: Store, update: RowUpdate, first_row: int) -> None: ...

    @abstractmethod
    def _on_device(self, store: Store, update: RowUpdate, first_row: int) -> None: ...

    def _clipped(self, update: RowUpdate) -> RowUpdate:
        assert self.settings.clip_norm is not None
        if isinstance(update.gradients, Tensor):
            from kmem_kernels.row_update.op import square_norms

            norms = square_norms(update.gradients).cpu().numpy()
        else:
            norms = kernels.square_norms(update.gradients)
        squares = np.array([norms.sum() * update.scale**2])
        self._sum(squares)
        norm = float(squares[0]) ** 0.5
        factor = min(1.0, self.settings.clip_norm / (norm + 1e-6))
        return replace(update, scale=update.scale * factor)

    def _noise(self, rows: np.ndarray, first_row: int, update: RowUpdate) -> np.ndarray | None:
        """Random bits [U, D] uint16 for stochastic rounding; None without it."""
        if not self.settings.stochastic_rounding:
            return None
        return kernels.rounding_noise(rows, self.dim, first_row, self._step_stream(update.step))

    def _step_stream(self, step: int) -> np.uint64:
        return np.uint64(counter_random.random_bits(self._stream, np.uint64(step)))

    def _host_rounding(self, update: RowUpdate, first_row: int) -> tuple[int, np.uint64, bool]:
        """The last arguments of compiled loops, for rounding bf16 rows: the number of the store's row 0 in the table,
        the random stream, and whether rounding is stochastic."""
        return first_row, self._step_stream(update.step), self.settings.stochastic_rounding

    def _run(
        self,
        loop: Callable[..., None],
        store: Store,
        update: RowUpdate,
        first_row: int,
        arrays: Sequence[str],
        scalars: Sequence[float],
        per_row: Sequence[np.ndarray] = (),
    ) -> None:
        """Run a compiled loop over the rows of a step: loop(array and column of the rows and of each state array, row
        numbers, order, starts, gradients, *per_row, scale, *scalars, *_host_rounding).

        Args:
            arrays: names of the state arrays.
            per_row: arrays [U]; each thread gets its part.
        """
        segments, rounding = update.segments, self._host_rounding(update, first_row)
        columns = [part for array in ("rows", *arrays) for part in store.columns(array)]
        numbers = [np.float32(number) for number in (update.scale, *scalars)]

        def run(part: slice) -> None:
            starts = segments.starts[part.start : part.stop + 1]
            values = (array[part] for array in per_row)
            loop(*columns, update.rows[part], segments.order, starts, update.gradients, *values, *numbers, *rounding)

        self._threads.run(len(update.rows), run)

    def _gradients(self, update: RowUpdate) -> "Gradients":
        """The gradients of a step as kernels take them."""
        from kmem_kernels.row_update.op import Gradients

        segments = update.segments
        order, starts = None, None
        if update.one_each:
            (rows,) = self._upload(segments.unique)
        else:
            rows, order, starts = self._upload(segments.unique, segments.order, segments.starts)
        values = update.gradients if isinstance(update.gradients, Tensor) else self._upload(update.gradients)[0]
        return Gradients(rows, values, update.scale, order, starts)

    def _rounding(self, update: RowUpdate, first_row: int) -> "RandomRounding | None":
        """The stochastic rounding of a step as kernels take it; None without it."""
        from kmem_kernels.row_update.op import RandomRounding

        if not self.settings.stochastic_rounding:
            return None
        return RandomRounding(int(self._step_stream(update.step)), first_row)


def _same_storage(*arrays: np.ndarray) -> list[Tensor]:
    return [torch.from_numpy(array) for array in arrays]
