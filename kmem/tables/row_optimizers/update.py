"""The gradient of a step at the owner of its rows, and how rows are read and written."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from kmem.tables.row_optimizers import kernels
from kmem.tables.segments import Segments
from kmem.tables.stores import Store


@dataclass(frozen=True)
class RowUpdate:
    """The gradients of a step at the owner of its rows: W contributions to U rows.

    Args:
        segments: local row numbers, and which contributions belong to each. Contributions of a row are summed in
            their order.
        gradients: [W, D] fp32: in host memory, or a tensor where the rows are.
        scale: factor on the gradients.
        step: number of this optimizer step, from 1.
        learning_rate: of this step, multiplier included.
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
        """True when row i's gradient is the i-th."""
        order = self.segments.order
        return len(order) == len(self.rows) and bool((order[1:] > order[:-1]).all())

    def summed(self) -> "RowUpdate":
        """One contribution per row: its sum. The fused optimizers sum on the way and do without."""
        if self.one_each:
            return self
        if len(self.gradients) == len(self.rows):
            gradients = self.gradients[self.segments.order]
        else:
            assert isinstance(self.gradients, np.ndarray)
            gradients = np.empty((len(self.rows), self.gradients.shape[1]), np.float32)
            kernels.sum_segments(gradients, self.segments.order, self.segments.starts, self.gradients)
        return replace(self, segments=Segments.distinct(self.rows), gradients=gradients)


def take_missed_steps(store: Store, update: RowUpdate) -> np.ndarray:
    """[U, 1] int64: optimizer steps since each row's last one; afterwards the rows' last step is this one. Rows that
    come from a longer run (`kmem bank replace`) have missed none."""
    rows, last = torch.from_numpy(update.rows), store["last_step"]
    missed = update.step - 1 - last[rows.to(last.device)].cpu().numpy().astype(np.int64)
    last[rows.to(last.device)] = update.step
    return np.maximum(missed, 0)


def take_updates(store: Store, update: RowUpdate) -> np.ndarray:
    """[U] int64: how many updates each row has had; afterwards it has had one more."""
    rows, updates = torch.from_numpy(update.rows), store["updates"]
    before = updates[rows].numpy().astype(np.int64)
    updates[rows] += 1
    return before[:, 0]


def host_array(tensor: Tensor) -> np.ndarray:
    """The tensor's memory as a numpy array; bf16 as its bits."""
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def host_columns(store: Store, array: str) -> tuple[np.ndarray, np.uintp]:
    """`Store.columns` as numpy: what compiled loops take for an array of a store."""
    values, start = store.columns(array)
    return host_array(values), np.uintp(start)
