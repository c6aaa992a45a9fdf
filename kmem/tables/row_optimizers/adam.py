"""Both forms of Adam on the rows that a step touches: a step on the host, with compiled loops, and on a device, with
kernels."""

from abc import abstractmethod
from functools import cached_property
from typing import Any

import numpy as np
import torch
from kmem_kernels.row_update.reference import AdamStep, missed_steps_decay, own_corrections
from torch import Tensor

from kmem.tables.row_optimizers import kernels
from kmem.tables.row_optimizers.row_optimizer import RowOptimizer
from kmem.tables.row_optimizers.update import RowUpdate, take_missed_steps, take_updates
from kmem.tables.stores import ArrayLayout, Store

# Shape letters: U rows of a step, L length of the table of decays.


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


class AdamCatchUp(Adam):
    """First decays the moments of the rows for the steps that they have missed. Moments, step count and weight decay
    are the same as with dense Adam."""

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
