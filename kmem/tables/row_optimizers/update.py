"""The gradients of a step at the owner of its rows, and the steps and updates that rows count."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from kmem.tables.row_optimizers import kernels
from kmem.tables.segments import Segments
from kmem.tables.stores import Store

# Shape letters: U rows, W contributions to their gradients, D values of a row.


@dataclass(frozen=True)
class RowUpdate:
    """The gradients of a step at the owner of its rows: W contributions to U rows.

    Args:
        segments: local row numbers, and the contributions that belong to each row. The contributions of a row are
            summed in order.
        gradients: [W, D] fp32, a host array, or a tensor on the device of the rows.
        scale: factor on the gradients.
        step: number of this optimizer step, counted from 1.
        learning_rate: learning rate of this step, multiplier included.
    """

    segments: Segments
    gradients: np.ndarray | Tensor
    scale: float
    step: int
    learning_rate: float

    @property
    def rows(self) -> np.ndarray:
        """[U] int64, local row numbers, ascending and unique."""
        return self.segments.unique

    @property
    def one_each(self) -> bool:
        """Whether gradient i is the only contribution to row i, for every row."""
        order = self.segments.order
        return len(order) == len(self.rows) and bool((order[1:] > order[:-1]).all())

    def summed(self) -> "RowUpdate":
        """The update with one contribution per row, the sum. (Fused optimizers sum during the update instead.)"""
        if self.one_each:
            return self
        if len(self.gradients) == len(self.rows):
            gradients = self.gradients[self.segments.order]
        else:
            assert isinstance(self.gradients, np.ndarray)
            gradients = np.empty((len(self.rows), self.gradients.shape[1]), np.float32)
            kernels.sum_segments(gradients, self.segments.order, self.segments.starts, self.gradients)
        return replace(self, segments=Segments.distinct(self.rows), gradients=gradients)


def sum_by_row(rows: np.ndarray, gradients: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers int64 [W] and gradients fp32 [W, D] -> (distinct rows [U], ascending; the sums of their gradients
    [U, D], in the order of the entries)."""
    segments = Segments.of(rows)
    sums = np.empty((len(segments.unique), gradients.shape[1]), np.float32)
    kernels.sum_segments(sums, segments.order, segments.starts, np.ascontiguousarray(gradients))
    return segments.unique, sums


def take_missed_steps(store: Store, update: RowUpdate) -> np.ndarray:
    """[U, 1] int64: number of optimizer steps that each row has missed since its last one. Sets the last step of the
    rows to this step. Rows that come from a longer run (`kmem bank replace`) have missed none."""
    rows, last = torch.from_numpy(update.rows), store["last_step"]
    missed = update.step - 1 - last[rows.to(last.device)].cpu().numpy().astype(np.int64)
    last[rows.to(last.device)] = update.step
    return np.maximum(missed, 0)


def take_updates(store: Store, update: RowUpdate) -> np.ndarray:
    """[U] int64: number of updates of each row before this one. Increments the counts."""
    rows, updates = torch.from_numpy(update.rows), store["updates"]
    before = updates[rows].numpy().astype(np.int64)
    updates[rows] += 1
    return before[:, 0]
