"""Adagrad with one accumulator per row."""

import numba
import numpy as np
import torch

from kmem.tables.row_optimizers.kernels import compiled, narrow, narrow_randomly, summed_gradient, widen
from kmem.tables.row_optimizers.row_optimizer import RowOptimizer
from kmem.tables.row_optimizers.update import RowUpdate
from kmem.tables.stores import ArrayLayout, Store


class RowwiseAdagrad(RowOptimizer):
    """The definition is `reference.rowwise_adagrad`."""

    def state(self) -> dict[str, ArrayLayout]:
        return {"second_moment": ArrayLayout(1, torch.float32)}

    def _on_host(self, store: Store, update: RowUpdate, first_row: int) -> None:
        scalars = (update.learning_rate, self.settings.eps)
        self._run((adagrad_fp32, adagrad_bf16), store, update, first_row, ("second_moment",), scalars)

    def _on_device(self, store: Store, update: RowUpdate, first_row: int) -> None:
        from kmem_kernels.row_update.op import rowwise_adagrad_

        gradients, rounding = self._gradients(update), self._rounding(update, first_row)
        numbers = (update.learning_rate, self.settings.eps)
        rowwise_adagrad_(store["rows"], store["second_moment"], gradients, *numbers, rounding)


@compiled
def adagrad_fp32(weights, at_w, second, at_v, rows, order, starts, gradients, scale, rate, eps):
    """Row-wise Adagrad on fp32 rows; one accumulator per row."""
    dim = gradients.shape[1]
    scratch = np.empty(dim, np.float32)
    for i in range(rows.shape[0]):
        w, g = weights[rows[i]], summed_gradient(i, order, starts, gradients, scratch)
        root = _accumulate(second[rows[i]], at_v, g, scale) + eps
        for column in range(dim):
            j = np.uintp(column)
            w[at_w + j] = w[at_w + j] - ((g[j] * scale) / root) * rate


@compiled
def adagrad_bf16(
    weights, at_w, second, at_v, rows, order, starts, gradients, scale, rate, eps, first_row, stream, stochastic
):
    """Row-wise Adagrad on bf16 rows."""
    dim = gradients.shape[1]
    scratch = np.empty(dim, np.float32)
    for i in range(rows.shape[0]):
        w, g = weights[rows[i]], summed_gradient(i, order, starts, gradients, scratch)
        root = _accumulate(second[rows[i]], at_v, g, scale) + eps
        counter = np.uint64(first_row + rows[i]) * np.uint64(dim)
        for column in range(dim):
            j = np.uintp(column)
            value = widen(w[at_w + j]) - ((g[j] * scale) / root) * rate
            if stochastic:
                w[at_w + j] = narrow_randomly(value, stream, counter + np.uint64(j))
            else:
                w[at_w + j] = narrow(value)


@numba.njit(nogil=True, error_model="numpy")
def _accumulate(second, at, g, scale):
    """Add the mean square of a gradient row to its accumulator second[at]; the root of the result."""
    total = 0.0
    for j in range(g.shape[0]):
        value = np.float64(g[j] * scale)
        total += value * value
    second[at] = second[at] + np.float32(total / g.shape[0])
    return np.sqrt(second[at])
