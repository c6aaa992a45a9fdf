"""Adam on the rows that a step touches. First, it decays their moments for the steps that they have missed."""

from typing import Any

import numpy as np
import torch
from kmem_kernels.row_update.reference import AdamStep, missed_steps_decay
from torch import Tensor

from kmem.tables.row_optimizers.adam import Adam
from kmem.tables.row_optimizers.update import RowUpdate, take_missed_steps
from kmem.tables.stores import ArrayLayout, Store

# Shape letters: L length of the table of decays.


class AdamCatchUp(Adam):
    """Moments, step count and weight decay are the same as with dense Adam."""

    _decay_table: tuple[tuple[int, float], Tensor] | None = None

    def state(self) -> dict[str, ArrayLayout]:
        return super().state() | {"last_step": ArrayLayout(1, torch.int32)}

    def _adam_step(self, update: RowUpdate) -> AdamStep:
        return AdamStep.dense(*self._numbers(update), update.step)

    def _decays(self, store: Store, update: RowUpdate) -> np.ndarray:
        return self._factors(take_missed_steps(store, update), update)

    def _for_the_kernel(self, store: Store, update: RowUpdate) -> dict[str, Any]:
        from kmem_kernels.row_update.op import CatchUp

        return {"catch_up": CatchUp(store["last_step"], update.step, self._decays_after(update))}

    def _decays_after(self, update: RowUpdate) -> Tensor:
        """fp32 [3, L] on the device of the rows: the factors after 0, 1, .. missed steps. Computed when the table is
        too short for the step, and in every step in which the learning rate changes the weight decay."""
        key = max(1024, 1 << update.step.bit_length()), self._shrink(update)
        if self._decay_table is None or self._decay_table[0] != key:
            self._decay_table = key, self._upload(self._factors(np.arange(key[0]), update))[0]
        return self._decay_table[1]

    def _factors(self, missed: np.ndarray, update: RowUpdate) -> np.ndarray:
        """fp32 [3, n]: the factors after `missed` [n] steps, this step's weight decay included."""
        factors = [(beta, missed) for beta in self.settings.betas] + [(self._shrink(update), missed + 1)]
        return np.stack([missed_steps_decay(*factor).reshape(-1) for factor in factors])
