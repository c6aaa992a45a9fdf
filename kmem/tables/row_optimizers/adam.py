"""The shared part of both forms of Adam: a step on the host, with compiled loops, and on a device, with kernels."""

from abc import abstractmethod
from typing import Any

import numpy as np
import torch
from kmem_kernels.row_update.reference import AdamStep

from kmem.tables.row_optimizers import kernels
from kmem.tables.row_optimizers.row_optimizer import RowOptimizer
from kmem.tables.row_optimizers.update import RowUpdate
from kmem.tables.stores import ArrayLayout, Store

# Shape letters: U rows of a step.


class Adam(RowOptimizer):
    """Two moments per value; `reference.adam` is the definition."""

    def state(self) -> dict[str, ArrayLayout]:
        vector = ArrayLayout(self.dim, torch.float32)
        return {"first_moment": vector, "second_moment": vector}

    @abstractmethod
    def _adam_step(self, update: RowUpdate) -> AdamStep: ...

    @abstractmethod
    def _decays(self, store: Store, update: RowUpdate) -> np.ndarray:
        """fp32 [3, U]: factors on the first moment, second moment and weight of each row, for the steps that it has
        missed; the factor on the weight includes this step's weight decay. Marks the rows as updated."""

    def _sizes(self, store: Store, update: RowUpdate, size: np.float32) -> np.ndarray:
        """fp32 [U]: the step size of each row."""
        return np.full(len(update.rows), size)

    @abstractmethod
    def _for_the_kernel(self, store: Store, update: RowUpdate) -> dict[str, Any]:
        """Decays and step sizes as keyword arguments of `kmem_kernels.row_update.op.adam_`."""

    def _numbers(self, update: RowUpdate) -> tuple[float, float, float, float]:
        """Betas, eps and learning rate."""
        return (*self.settings.betas, self.settings.eps, update.learning_rate)

    def _shrink(self, update: RowUpdate) -> float:
        """The factor on weights for one step of weight decay."""
        return 1 - update.learning_rate * self.settings.weight_decay

    def _on_host(self, store: Store, update: RowUpdate, first_row: int) -> None:
        step = self._adam_step(update)
        scalars = (1 - step.beta1, 1 - step.beta2, step.inverse_root, step.eps)
        per_row = (*self._decays(store, update), self._sizes(store, update, np.float32(step.step_size)))
        moments = ("first_moment", "second_moment")
        self._run(kernels.adam, store, update, first_row, moments, scalars, per_row)

    def _on_device(self, store: Store, update: RowUpdate, first_row: int) -> None:
        from kmem_kernels.row_update.op import adam_

        adam_(
            store["rows"],
            store["first_moment"],
            store["second_moment"],
            self._gradients(update),
            self._adam_step(update),
            rounding=self._rounding(update, first_row),
            **self._for_the_kernel(store, update),
        )
