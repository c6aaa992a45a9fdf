"""Adam on the rows that a step touches."""

from functools import cached_property
from typing import Any

import numpy as np
import torch
from kmem_kernels.row_update.reference import AdamStep, own_corrections
from torch import Tensor

from kmem.tables.row_optimizers.adam import Adam
from kmem.tables.row_optimizers.update import RowUpdate, take_updates
from kmem.tables.stores import ArrayLayout, Store


class LazyAdam(Adam):
    """As `torch.optim.SparseAdam`: a step does not affect the rows that it does not touch. The bias correction counts
    the steps of the table, or each row's own updates (`counts_updates`)."""

    def state(self) -> dict[str, ArrayLayout]:
        count = {"updates": ArrayLayout(1, torch.int32)} if self.settings.counts_updates else {}
        return super().state() | count

    def _adam_step(self, update: RowUpdate) -> AdamStep:
        if self.settings.counts_updates:
            return AdamStep.own(*self._numbers(update))
        return AdamStep.lazy(*self._numbers(update), update.step)

    def _decays(self, store: Store, update: RowUpdate) -> np.ndarray:
        decays = np.ones((3, len(update.rows)), np.float32)
        decays[2] = self._shrink(update)
        return decays

    def _sizes(self, store: Store, update: RowUpdate, size: np.float32) -> np.ndarray:
        if not self.settings.counts_updates:
            return super()._sizes(store, update, size)
        before = take_updates(store, update)
        return self._corrections[np.minimum(before, len(self._corrections) - 1)] * size

    def _for_the_kernel(self, store: Store, update: RowUpdate) -> dict[str, Any]:
        from kmem_kernels.row_update.op import OwnSteps

        own_steps = OwnSteps(store["updates"], self._uploaded_corrections) if self.settings.counts_updates else None
        return {"decay": self._shrink(update), "own": own_steps}

    @cached_property
    def _corrections(self) -> np.ndarray:
        return own_corrections(*self.settings.betas)

    @cached_property
    def _uploaded_corrections(self) -> Tensor:
        return self._upload(self._corrections)[0]
