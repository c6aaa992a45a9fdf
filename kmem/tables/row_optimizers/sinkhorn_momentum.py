"""Sinkhorn-balanced momentum (DeepSeek-V4.1 report, arXiv 2609.19969), streamed: it stores no matrix but the momentum.

The balanced matrix is diag(r) H diag(c), and after a row pass c determines r: r_i = 1 / ||H_i * c||. So a row pass and
the column pass after it are one sweep over H, which needs only the vector c and accumulates one vector of column
squares; the ranks of the table sum this vector.
"""

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import torch
from kmem_kernels.row_update.reference import missed_steps_decay, write_rows
from torch import Tensor

from kmem.config import RowOptimizerConfig
from kmem.tables.row_optimizers import kernels
from kmem.tables.row_optimizers.row_optimizer import RowOptimizer
from kmem.tables.row_optimizers.update import RowUpdate, host_columns, take_missed_steps
from kmem.tables.stores import ArrayLayout, Store, chunk_ranges

# Shape letters: U rows of an update, D values of a row.

_EPS = 1e-20


class SinkhornMomentum(RowOptimizer):
    """`reference.sinkhorn_momentum` is the definition. It applies to all rows (`dense`), or to the rows of the update,
    whose momentum is first decayed for the steps that they have missed. A step is collective: over the ranks of the
    table, it sums D numbers (passes - 1) / 2 times, and two numbers once. On a device, a step is several passes of
    torch operations."""

    collective = True

    def state(self) -> dict[str, ArrayLayout]:
        lazy = {} if self.settings.dense else {"last_step": ArrayLayout(1, torch.int32)}
        return {"momentum": ArrayLayout(self.dim, torch.float32), **lazy}

    def _on_host(self, store: Store, update: RowUpdate, first_row: int) -> None:
        rounding = self._host_rounding(update, first_row)
        self._step(HostSweep(self.settings, store, update.summed(), rounding), update.learning_rate)

    def _on_device(self, store: Store, update: RowUpdate, first_row: int) -> None:
        def noise(rows: np.ndarray) -> np.ndarray | None:
            return self._noise(rows, first_row, update)

        self._step(DeviceSweep(self.settings, store, update.summed(), noise), update.learning_rate)

    def _step(self, sweep: "Sweep", rate: float) -> None:
        rho = sweep.first()
        self._sum(rho)
        least = self.settings.threshold * float(rho[0]) / max(float(rho[1]), 1.0)
        scales = np.ones(sweep.dim)
        for _ in range(self.settings.passes // 2):
            squares = sweep.column_squares(scales, least)
            self._sum(squares)
            # Column j of the balanced matrix is (H_ij r_i) c_j; divide it by its norm.
            scales = scales / (np.sqrt(squares) + _EPS)
        sweep.move(scales, least, -self.settings.gamma * rate * sweep.dim**0.5)


class Sweep(Protocol):
    """Passes over H = beta * M + (1 - beta) * G in fp64; every pass recomputes H from the momentum M [rows, D]."""

    dim: int

    def first(self) -> np.ndarray:
        """Update the momentum, M <- beta * M + (1 - beta) * G. Returns fp64 [sum of the norms of H's rows, number of
        rows]."""
        ...

    def column_squares(self, scales: np.ndarray, least: float) -> np.ndarray:
        """fp64 [D]: sums of the squares of each column of the balanced matrix, which is H with its columns scaled and
        every row divided by its norm; rows of H with a norm of at most `least` are set to 0."""
        ...

    def move(self, scales: np.ndarray, least: float, factor: float) -> None:
        """Add the balanced matrix times `factor` to the weights; a row whose change is 0 keeps its bits."""
        ...


class HostSweep:
    """Compiled loops, one row at a time.

    Args:
        rounding: for bf16 rows: the number of the store's row 0 in the table, the random stream, and whether rounding
            is stochastic.
    """

    def __init__(
        self, settings: RowOptimizerConfig, store: Store, update: RowUpdate, rounding: tuple[int, np.uint64, bool]
    ) -> None:
        self._settings, self._store, self._update = settings, store, update
        self._rounding = rounding
        self._momentum = host_columns(store, "momentum")
        self.dim = store["momentum"].shape[1]
        self._scalars = np.float32(update.scale), np.float32(settings.momentum), np.float32(1 - settings.momentum)

    def first(self) -> np.ndarray:
        sums = np.zeros(2)
        if not self._settings.dense:
            missed = take_missed_steps(self._store, self._update)
            decays = missed_steps_decay(self._settings.momentum, missed + 1).reshape(-1)
        for part, rows, sources in self._chunks():
            if self._settings.dense:
                decay = np.full(len(rows), self._settings.momentum, np.float32)
            else:
                decay = decays[part]
            sums[0] += kernels.sinkhorn_first(
                *self._momentum, rows, sources, self._update.gradients, decay, *self._scalars
            )
            sums[1] += len(rows)
        return sums

    def column_squares(self, scales: np.ndarray, least: float) -> np.ndarray:
        squares = np.zeros(self.dim)
        for _, rows, sources in self._chunks():
            kernels.sinkhorn_columns(
                squares, *self._momentum, rows, sources, self._update.gradients, *self._scalars, scales, least, _EPS
            )
        return squares

    def move(self, scales: np.ndarray, least: float, factor: float) -> None:
        table = host_columns(self._store, "rows")
        for _, rows, sources in self._chunks():
            kernels.sinkhorn_move(
                *table, *self._momentum, rows, sources, self._update.gradients, *self._scalars, scales, least, _EPS,
                factor, *self._rounding,
            )  # fmt: skip

    def _chunks(self) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
        """Yield chunks of (slice of the rows, local row numbers, places of their gradients); -1: no gradient."""
        count = self._store.rows if self._settings.dense else len(self._update.rows)
        for start, stop in chunk_ranges(count, 8 * self.dim):
            if not self._settings.dense:
                yield slice(start, stop), self._update.rows[start:stop], np.arange(start, stop)
                continue
            a, b = np.searchsorted(self._update.rows, [start, stop])
            sources = np.full(stop - start, -1)
            sources[self._update.rows[a:b] - start] = np.arange(a, b)
            yield slice(start, stop), np.arange(start, stop), sources


class DeviceSweep:
    """Torch operations, one chunk of rows at a time.

    Args:
        noise: local rows [U] -> random bits [U, D] uint16, or None to round to nearest.
    """

    def __init__(
        self,
        settings: RowOptimizerConfig,
        store: Store,
        update: RowUpdate,
        noise: Callable[[np.ndarray], np.ndarray | None],
    ) -> None:
        self._settings, self._store, self._update, self._noise = settings, store, update, noise
        self._momentum = store["momentum"]
        self.dim, self._device = self._momentum.shape[1], self._momentum.device
        self._count = store.rows if settings.dense else len(update.rows)

    def first(self) -> np.ndarray:
        beta, sums = self._settings.momentum, np.zeros(2)
        if not self._settings.dense:
            decay = missed_steps_decay(beta, take_missed_steps(self._store, self._update) + 1)
        for start, stop in chunk_ranges(self._count, 8 * self.dim):
            if self._settings.dense:
                self._momentum[start:stop] *= beta
            else:
                rows = torch.from_numpy(self._update.rows[start:stop]).to(self._device)
                self._momentum[rows] *= torch.from_numpy(decay[start:stop]).to(self._device)
            touched, gradients = self._gradients(start, stop)
            self._momentum[touched] += gradients * (1 - beta)
            norms = (self._chunk(start, stop)[0] ** 2).sum(1).sqrt()
            sums += [float(norms.sum()), len(norms)]
        return sums

    def column_squares(self, scales: np.ndarray, least: float) -> np.ndarray:
        squares = torch.zeros(self.dim, dtype=torch.float64, device=self._device)
        for start, stop in chunk_ranges(self._count, 8 * self.dim):
            balanced = self._by_rows(self._chunk(start, stop)[0], scales, least)
            squares += (balanced * balanced).sum(0)
        return squares.cpu().numpy()

    def move(self, scales: np.ndarray, least: float, factor: float) -> None:
        table = self._store["rows"]
        for start, stop in chunk_ranges(self._count, 8 * self.dim):
            h, rows = self._chunk(start, stop)
            change = self._by_rows(h, scales, least) * factor
            moving = change.any(1)
            rows = rows[moving.cpu().numpy()]
            where = torch.from_numpy(rows).to(self._device)
            write_rows(table, where, table[where].float() + change[moving].float(), self._noise(rows))

    def _by_rows(self, h: Tensor, scales: np.ndarray, least: float) -> Tensor:
        live = (h * h).sum(1).sqrt() > least
        scaled = h * torch.from_numpy(scales).to(self._device)
        return scaled * (live / ((scaled * scaled).sum(1).sqrt() + _EPS))[:, None]

    def _gradients(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """The local rows of a chunk that have a gradient, and their gradients."""
        a, b = start, stop
        if self._settings.dense:
            a, b = np.searchsorted(self._update.rows, [start, stop])
        rows = torch.from_numpy(self._update.rows[a:b]).to(self._device)
        return rows, torch.as_tensor(self._update.gradients[a:b]).to(self._device) * self._update.scale

    def _chunk(self, start: int, stop: int) -> tuple[Tensor, np.ndarray]:
        touched, gradients = self._gradients(start, stop)
        if self._settings.dense:
            rows = np.arange(start, stop)
            h = self._momentum[start:stop] * self._settings.momentum
            h[touched - start] += gradients * (1 - self._settings.momentum)
        else:
            rows = self._update.rows[start:stop]
            h = self._momentum[touched] * self._settings.momentum + gradients * (1 - self._settings.momentum)
        return h.double(), rows
