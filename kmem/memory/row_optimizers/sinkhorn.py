"""Sinkhorn-balanced momentum (DeepSeek-V4.1 report, arXiv 2609.19969), streamed: no matrix beside the momentum itself.

The balanced matrix is diag(r) H diag(c), and after a row pass r is determined by c: r_i = 1 / ||H_i * c||. So a column
pass with the row pass before it is one sweep over H that needs the vector c alone, and adds up one vector of column
squares, which the ranks of the table sum.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from kmem.config import RowOptimizerConfig
from kmem.memory.row_optimizers.reference import missed_steps_decay
from kmem.memory.row_optimizers.update import RowUpdate, take_missed_steps, write_rows
from kmem.memory.stores import Store, chunk_ranges

_EPS = 1e-20


def sinkhorn_step(
    settings: RowOptimizerConfig,
    store: Store,
    update: RowUpdate,
    sum_over_ranks: Callable[[np.ndarray], None],
    noise: Callable[[np.ndarray], np.ndarray | None],
) -> None:
    """One step: of all rows (`dense`) or of the update's rows, whose momentum is decayed for the steps they missed.

    Collective: (passes - 1) / 2 sums of D + 1 numbers and one of two over the ranks of the table.
    """
    sweep = _Sweep(settings, store, update)
    rho = np.zeros(2)
    for h, _ in sweep.first():
        norms = (h * h).sum(1).sqrt()
        rho += [float(norms.sum()), len(norms)]
    sum_over_ranks(rho)
    least = settings.threshold * rho[0] / max(rho[1], 1)

    scales = torch.ones(sweep.dim, dtype=torch.float64, device=sweep.device)
    for _ in range(settings.passes // 2):
        squares = torch.zeros_like(scales)
        for h, _ in sweep:
            balanced = _by_rows(h, scales, least)
            squares += (balanced * balanced).sum(0)
        total = squares.cpu().numpy()
        sum_over_ranks(total)
        # The columns of U are (H_ij r_i) c_j and are divided by their norms.
        scales = scales / (torch.from_numpy(total).to(scales).sqrt() + _EPS)
    factor = settings.gamma * update.learning_rate * sweep.dim**0.5
    for h, rows in sweep:
        sweep.move(rows, _by_rows(h, scales, least) * -factor, noise)


def _by_rows(h: Tensor, scales: Tensor, least: float) -> Tensor:
    """H with its columns scaled and every row divided by its norm; rows whose own norm is at most `least` become 0."""
    live = (h * h).sum(1).sqrt() > least
    scaled = h * scales
    return scaled * (live / ((scaled * scaled).sum(1).sqrt() + _EPS))[:, None]


class _Sweep:
    """Chunks of H = beta * M + (1 - beta) * G in fp64, computed again in every sweep from the momentum M [rows, D]."""

    def __init__(self, settings: RowOptimizerConfig, store: Store, update: RowUpdate) -> None:
        self._settings, self._store, self._update = settings, store, update
        self._momentum = store["momentum"]
        self.dim, self.device = self._momentum.shape[1], self._momentum.device
        self._count = store.rows if settings.dense else len(update.rows)

    def first(self) -> Iterator[tuple[Tensor, np.ndarray]]:
        """Update the momentum on the way: M <- beta * M + (1 - beta) * G."""
        beta = self._settings.momentum
        if not self._settings.dense:
            decay = missed_steps_decay(beta, take_missed_steps(self._store, self._update) + 1)
        for start, stop in chunk_ranges(self._count, 8 * self.dim):
            if self._settings.dense:
                self._momentum[start:stop] *= beta
            else:
                rows = torch.from_numpy(self._update.rows[start:stop]).to(self.device)
                self._momentum[rows] *= torch.from_numpy(decay[start:stop]).to(self.device)
            touched, gradients = self._gradients(start, stop)
            self._momentum[touched] += gradients * (1 - beta)
            yield self._chunk(start, stop)

    def __iter__(self) -> Iterator[tuple[Tensor, np.ndarray]]:
        for start, stop in chunk_ranges(self._count, 8 * self.dim):
            yield self._chunk(start, stop)

    def move(self, rows: np.ndarray, change: Tensor, noise: Callable[[np.ndarray], np.ndarray | None]) -> None:
        """Add to rows; rows that do not move keep their bits."""
        moving = change.any(1)
        rows = rows[moving.cpu().numpy()]
        table, where = self._store["rows"], torch.from_numpy(rows).to(self.device)
        write_rows(table, where, table[where].float() + change[moving].float(), noise(rows))

    def _gradients(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Local rows with a gradient in a chunk, and that gradient."""
        a, b = start, stop
        if self._settings.dense:
            a, b = np.searchsorted(self._update.rows, [start, stop])
        rows = torch.from_numpy(self._update.rows[a:b]).to(self.device)
        return rows, torch.from_numpy(self._update.gradients[a:b]).to(self.device) * self._update.scale

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
