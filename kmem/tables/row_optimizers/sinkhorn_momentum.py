"""Sinkhorn-balanced momentum (DeepSeek-V4.1 report, arXiv 2609.19969), streamed: it stores no matrix but the momentum.

The balanced matrix is diag(r) H diag(c), and after a row pass c determines r: r_i = 1 / ||H_i * c||. So a row pass and
the column pass after it are one sweep over H, which needs only the vector c and accumulates one vector of column
squares; the ranks of the table sum this vector.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import numpy as np
import torch
from kmem_kernels.row_update.reference import missed_steps_decay, write_rows
from torch import Tensor

from kmem.config import RowOptimizerConfig
from kmem.tables.row_optimizers import kernels
from kmem.tables.row_optimizers.row_optimizer import RowOptimizer
from kmem.tables.row_optimizers.update import RowUpdate, take_missed_steps
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


class Sweep(ABC):
    """Passes over H = beta * M + (1 - beta) * G in fp64; every pass recomputes H from the momentum M [rows, D]."""

    def __init__(self, settings: RowOptimizerConfig, store: Store, update: RowUpdate) -> None:
        self._settings, self._store, self._update = settings, store, update
        self.dim = store["momentum"].shape[1]

    @abstractmethod
    def first(self) -> np.ndarray:
        """Update the momentum, M <- beta * M + (1 - beta) * G. Returns fp64 [sum of the norms of H's rows, number of
        rows]."""

    @abstractmethod
    def column_squares(self, scales: np.ndarray, least: float) -> np.ndarray:
        """fp64 [D]: sums of the squares of each column of the balanced matrix, which is H with its columns scaled and
        every row divided by its norm; rows of H with a norm of at most `least` are set to 0."""

    @abstractmethod
    def move(self, scales: np.ndarray, least: float, factor: float) -> None:
        """Add the balanced matrix times `factor` to the weights; a row whose change is 0 keeps its bits."""

    def _decays(self) -> np.ndarray | None:
        """fp32 [U, 1]: factors on the momentum of the update's rows, for this step and the steps that they have missed.
        Marks the rows as updated. None if the step applies to all rows: the factor is then beta."""
        if self._settings.dense:
            return None
        return missed_steps_decay(self._settings.momentum, take_missed_steps(self._store, self._update) + 1)

    def _chunks(self) -> Iterator[tuple[np.ndarray, slice]]:
        """Yield chunks of (local row numbers, slice of the update's rows, which are those of them with a gradient)."""
        dense, updated = self._settings.dense, self._update.rows
        for start, stop in chunk_ranges(self._store.rows if dense else len(updated), 8 * self.dim):
            if dense:
                yield np.arange(start, stop), slice(*np.searchsorted(updated, [start, stop]).tolist())
            else:
                yield updated[start:stop], slice(start, stop)

    def _with_gradient(self, rows: np.ndarray, part: slice) -> np.ndarray | slice:
        """The places of the rows with a gradient in a chunk."""
        return self._update.rows[part] - rows[0] if self._settings.dense else slice(None)


class HostSweep(Sweep):
    """Compiled loops, one row at a time.

    Args:
        rounding: for bf16 rows: the number of the store's row 0 in the table, the random stream, and whether rounding
            is stochastic.
    """

    def __init__(
        self, settings: RowOptimizerConfig, store: Store, update: RowUpdate, rounding: tuple[int, np.uint64, bool]
    ) -> None:
        super().__init__(settings, store, update)
        self._rounding = rounding
        self._momentum = store.columns("momentum")
        self._scalars = np.float32(update.scale), np.float32(settings.momentum), np.float32(1 - settings.momentum)

    def first(self) -> np.ndarray:
        sums, decays = np.zeros(2), self._decays()
        for rows, part in self._chunks():
            decay = np.full(len(rows), self._settings.momentum, np.float32) if decays is None else decays[part, 0]
            sums[0] += kernels.sinkhorn_first(*self._momentum, *self._gradients(rows, part), decay, *self._scalars)
            sums[1] += len(rows)
        return sums

    def column_squares(self, scales: np.ndarray, least: float) -> np.ndarray:
        squares = np.zeros(self.dim)
        for chunk in self._chunks():
            gradients = self._gradients(*chunk)
            kernels.sinkhorn_columns(squares, *self._momentum, *gradients, *self._scalars, scales, least, _EPS)
        return squares

    def move(self, scales: np.ndarray, least: float, factor: float) -> None:
        table = self._store.columns("rows")
        for chunk in self._chunks():
            gradients = self._gradients(*chunk)
            kernels.sinkhorn_move(
                *table, *self._momentum, *gradients, *self._scalars, scales, least, _EPS, factor, *self._rounding
            )

    def _gradients(self, rows: np.ndarray, part: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray | Tensor]:
        """A chunk as loops take it: its rows, the places of their gradients (-1: no gradient), and all gradients."""
        places = np.full(len(rows), -1)
        places[self._with_gradient(rows, part)] = np.arange(part.start, part.stop)
        return rows, places, self._update.gradients


class DeviceSweep(Sweep):
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
        super().__init__(settings, store, update)
        self._noise, self._momentum = noise, store["momentum"]
        self._device = self._momentum.device

    def first(self) -> np.ndarray:
        beta, sums, decays = self._settings.momentum, np.zeros(2), self._decays()
        for rows, part in self._chunks():
            self._momentum[self._at(rows)] *= (
                beta if decays is None else torch.from_numpy(decays[part]).to(self._device)
            )
            updated = torch.from_numpy(self._update.rows[part]).to(self._device)
            self._momentum[updated] += self._gradients(part) * (1 - beta)
            norms = (self._chunk(rows, part) ** 2).sum(1).sqrt()
            sums += [float(norms.sum()), len(norms)]
        return sums

    def column_squares(self, scales: np.ndarray, least: float) -> np.ndarray:
        squares = torch.zeros(self.dim, dtype=torch.float64, device=self._device)
        for chunk in self._chunks():
            balanced = self._by_rows(self._chunk(*chunk), scales, least)
            squares += (balanced * balanced).sum(0)
        return squares.cpu().numpy()

    def move(self, scales: np.ndarray, least: float, factor: float) -> None:
        table = self._store["rows"]
        for rows, part in self._chunks():
            change = self._by_rows(self._chunk(rows, part), scales, least) * factor
            moving = change.any(1)
            moved = rows[moving.cpu().numpy()]
            where = torch.from_numpy(moved).to(self._device)
            write_rows(table, where, table[where].float() + change[moving].float(), self._noise(moved))

    def _by_rows(self, h: Tensor, scales: np.ndarray, least: float) -> Tensor:
        live = (h * h).sum(1).sqrt() > least
        scaled = h * torch.from_numpy(scales).to(self._device)
        return scaled * (live / ((scaled * scaled).sum(1).sqrt() + _EPS))[:, None]

    def _chunk(self, rows: np.ndarray, part: slice) -> Tensor:
        h = self._momentum[self._at(rows)] * self._settings.momentum
        h[self._with_gradient(rows, part)] += self._gradients(part) * (1 - self._settings.momentum)
        return h.double()

    def _at(self, rows: np.ndarray) -> slice | Tensor:
        """The rows of a chunk as an index of the momentum."""
        return slice(rows[0], rows[-1] + 1) if self._settings.dense else torch.from_numpy(rows).to(self._device)

    def _gradients(self, part: slice) -> Tensor:
        return torch.as_tensor(self._update.gradients[part]).to(self._device) * self._update.scale
