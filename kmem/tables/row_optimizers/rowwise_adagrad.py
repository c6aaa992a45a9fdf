"""Adagrad with one accumulator per row."""

import torch

from kmem.tables.row_optimizers import kernels
from kmem.tables.row_optimizers.row_optimizer import RowOptimizer
from kmem.tables.row_optimizers.update import RowUpdate
from kmem.tables.stores import ArrayLayout, Store


class RowwiseAdagrad(RowOptimizer):
    """`reference.rowwise_adagrad` is the definition."""

    def state(self) -> dict[str, ArrayLayout]:
        return {"second_moment": ArrayLayout(1, torch.float32)}

    def _on_host(self, store: Store, update: RowUpdate, first_row: int) -> None:
        scalars = (update.learning_rate, self.settings.eps)
        self._run(kernels.rowwise_adagrad, store, update, first_row, ("second_moment",), scalars)

    def _on_device(self, store: Store, update: RowUpdate, first_row: int) -> None:
        from kmem_kernels.row_update.op import rowwise_adagrad_

        gradients, rounding = self._gradients(update), self._rounding(update, first_row)
        numbers = (update.learning_rate, self.settings.eps)
        rowwise_adagrad_(store["rows"], store["second_moment"], gradients, *numbers, rounding)
