"""What both forms of Adam share: the compiled loops, and a step on the host and on a device."""

from abc import abstractmethod
from typing import Any

import numba
import numpy as np
import torch
from kmem_kernels.row_update.reference import AdamStep

from kmem.tables.row_optimizers.kernels import compiled, narrow, narrow_randomly, summed_gradient, widen
from kmem.tables.row_optimizers.row_optimizer import RowOptimizer
from kmem.tables.row_optimizers.update import RowUpdate
from kmem.tables.stores import ArrayLayout, Store


class Adam(RowOptimizer):
    """Two moments per value; the definition is `reference.adam`."""

    def state(self) -> dict[str, ArrayLayout]:
        vector = ArrayLayout(self.dim, torch.float32)
        return {"first_moment": vector, "second_moment": vector}

    @abstractmethod
    def _adam_step(self, update: RowUpdate) -> AdamStep: ...

    @abstractmethod
    def _decays(self, store: Store, update: RowUpdate) -> np.ndarray:
        """fp32 [3, U]: factors on first moment, second moment and weight: those of missed steps, and this step's decay
        of weights; marks the rows as updated."""

    def _sizes(self, store: Store, update: RowUpdate, size: np.float32) -> np.ndarray:
        """fp32 [U]: the size of the step of each row."""
        return np.full(len(update.rows), size)

    @abstractmethod
    def _for_the_kernel(self, store: Store, update: RowUpdate) -> dict[str, Any]:
        """Decays and sizes as `kmem_kernels.row_update.op.adam_` takes them, by the names of its arguments."""

    def _numbers(self, update: RowUpdate) -> tuple[float, float, float, float]:
        """Betas, eps and learning rate."""
        return (*self.settings.betas, self.settings.eps, update.learning_rate)

    def _shrink(self, update: RowUpdate) -> float:
        """Factor of a step's weight decay."""
        return 1 - update.learning_rate * self.settings.weight_decay

    def _on_host(self, store: Store, update: RowUpdate, first_row: int) -> None:
        step = self._adam_step(update)
        scalars = (1 - step.beta1, 1 - step.beta2, step.inverse_root, step.eps)
        per_row = (*self._decays(store, update), self._sizes(store, update, np.float32(step.step_size)))
        moments = ("first_moment", "second_moment")
        self._run((adam_fp32, adam_bf16), store, update, first_row, moments, scalars, per_row)

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


@numba.njit(inline="always")
def _adam(w, g, m, v, decay_m, decay_v, decay_w, rate_m, rate_v, inverse_root, eps, size):
    m = m * decay_m
    m = m + (g - m) * rate_m
    v = v * decay_v
    v = v + (g * g - v) * rate_v
    w = w * decay_w
    w = w - (m / (np.sqrt(v) * inverse_root + eps)) * size
    return w, m, v


@compiled
def adam_fp32(
    weights,
    at_w,
    first,
    at_m,
    second,
    at_v,
    rows,
    order,
    starts,
    gradients,
    decays_m,
    decays_v,
    decays_w,
    sizes,
    scale,
    rate_m,
    rate_v,
    inverse_root,
    eps,
):
    """Adam on fp32 rows. rows [U] int64; gradients [W, D] fp32 (times `scale`), those of
    row i at order[starts[i]:starts[i + 1]]; decays and sizes of the step [U] fp32."""
    dim = gradients.shape[1]
    scratch = np.empty(dim, np.float32)
    for i in range(rows.shape[0]):
        w, m, v = weights[rows[i]], first[rows[i]], second[rows[i]]
        g = summed_gradient(i, order, starts, gradients, scratch)
        a, b, c, size = decays_m[i], decays_v[i], decays_w[i], sizes[i]
        for column in range(dim):
            j = np.uintp(column)
            w[at_w + j], m[at_m + j], v[at_v + j] = _adam(
                w[at_w + j], g[j] * scale, m[at_m + j], v[at_v + j], a, b, c, rate_m, rate_v, inverse_root, eps, size
            )


@compiled
def adam_bf16(
    weights,
    at_w,
    first,
    at_m,
    second,
    at_v,
    rows,
    order,
    starts,
    gradients,
    decays_m,
    decays_v,
    decays_w,
    sizes,
    scale,
    rate_m,
    rate_v,
    inverse_root,
    eps,
    first_row,
    stream,
    stochastic,
):
    """Adam on bf16 rows; `first_row` is the table's number of local row 0, for the random stream of rounding."""
    dim = gradients.shape[1]
    scratch = np.empty(dim, np.float32)
    for i in range(rows.shape[0]):
        w, m, v = weights[rows[i]], first[rows[i]], second[rows[i]]
        g = summed_gradient(i, order, starts, gradients, scratch)
        a, b, c, size = decays_m[i], decays_v[i], decays_w[i], sizes[i]
        counter = np.uint64(first_row + rows[i]) * np.uint64(dim)
        for column in range(dim):
            j = np.uintp(column)
            value, m[at_m + j], v[at_v + j] = _adam(
                widen(w[at_w + j]),
                g[j] * scale,
                m[at_m + j],
                v[at_v + j],
                a,
                b,
                c,
                rate_m,
                rate_v,
                inverse_root,
                eps,
                size,
            )
            if stochastic:
                w[at_w + j] = narrow_randomly(value, stream, counter + np.uint64(j))
            else:
                w[at_w + j] = narrow(value)
