"""Row optimizers bound to a store: compiled loops where the rows are on the host, torch operations on a device."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from kmem.config import RowOptimizerConfig
from kmem.memory import counter_random
from kmem.memory.row_optimizers import kernels, reference
from kmem.memory.row_optimizers.sinkhorn import DeviceSweep, HostSweep, Sweep, sinkhorn_step
from kmem.memory.row_optimizers.update import RowUpdate, host_columns, take_missed_steps, write_rows
from kmem.memory.row_threads import RowThreads
from kmem.memory.stores import ArrayLayout, Store


class RowOptimizer:
    """Updates rows and their state in place.

    Args:
        settings: the user's choices.
        dim: width of a row.
        seed: of the run; with `table` it seeds stochastic rounding.
        table: canonical name of the table.
        threads: they share the rows of a step.
        sum_over_ranks: adds up a small fp64 array over all ranks that share the table, in place.
    """

    def __init__(
        self,
        settings: RowOptimizerConfig,
        dim: int,
        seed: int,
        table: str,
        threads: RowThreads | None = None,
        sum_over_ranks: Callable[[np.ndarray], None] = lambda _: None,
    ) -> None:
        self.settings, self.dim = settings, dim
        self._threads, self._sum = threads or RowThreads(), sum_over_ranks
        self._stream = counter_random.key(seed, table, "rounding")

    def state(self) -> dict[str, ArrayLayout]:
        """The arrays that each row needs beside itself."""
        vector, scalar = ArrayLayout(self.dim, torch.float32), ArrayLayout(1, torch.float32)
        match self.settings.name:
            case "lazy_adam":
                return {"first_moment": vector, "second_moment": vector}
            case "adam_catchup":
                return {"first_moment": vector, "second_moment": vector, "last_step": ArrayLayout(1, torch.int32)}
            case "rowwise_adagrad":
                return {"second_moment": scalar}
            case "sinkhorn_momentum":
                lazy = {} if self.settings.dense else {"last_step": ArrayLayout(1, torch.int32)}
                return {"momentum": vector, **lazy}

    def apply(self, store: Store, update: RowUpdate, first_row: int) -> None:
        """One step. `first_row` is the table's number of the store's row 0. Collective over the ranks of the table
        when the settings clip or balance columns, so ranks without rows call it too."""
        streamed = self.settings.name == "sinkhorn_momentum"
        if self.settings.clip_norm is not None or streamed or not store.on_host:
            update = update.summed()
        if self.settings.clip_norm is not None:
            update = self._clipped(update)
        if streamed:
            sinkhorn_step(self.settings, self._sweep(store, update, first_row), update.learning_rate, self._sum)
        elif len(update.rows):
            if store.on_host:
                self._on_host(store, update, first_row)
            else:
                self._on_device(store, update, first_row)

    def _sweep(self, store: Store, update: RowUpdate, first_row: int) -> Sweep:
        if store.on_host:
            rounding = (first_row, self._step_stream(update.step), self.settings.stochastic_rounding)
            return HostSweep(self.settings, store, update, rounding)
        return DeviceSweep(self.settings, store, update, lambda rows: self._noise(rows, first_row, update))

    def _clipped(self, update: RowUpdate) -> RowUpdate:
        assert self.settings.clip_norm is not None
        squares = np.array([kernels.square_norms(update.gradients).sum() * update.scale**2])
        self._sum(squares)
        norm = float(squares[0]) ** 0.5
        factor = min(1.0, self.settings.clip_norm / (norm + 1e-6))
        return replace(update, scale=update.scale * factor)

    def _noise(self, rows: np.ndarray, first_row: int, update: RowUpdate) -> np.ndarray | None:
        """[U, D] uint16, when rows are rounded at random."""
        if not self.settings.stochastic_rounding:
            return None
        return kernels.rounding_noise(rows, self.dim, first_row, self._step_stream(update.step))

    def _step_stream(self, step: int) -> np.uint64:
        return np.uint64(counter_random.random_bits(self._stream, np.uint64(step)))

    def _adam_step(self, update: RowUpdate) -> reference.AdamStep:
        make = reference.AdamStep.lazy if self.settings.name == "lazy_adam" else reference.AdamStep.dense
        return make(*self.settings.betas, self.settings.eps, update.learning_rate, update.step)

    def _decays(self, store: Store, update: RowUpdate) -> list[np.ndarray]:
        """[U, 1] fp32 factors on first moment, second moment and weight for missed steps; marks the rows as updated."""
        if self.settings.name == "lazy_adam":
            return [np.ones((len(update.rows), 1), np.float32)] * 3
        missed = take_missed_steps(store, update)
        shrink = 1 - update.learning_rate * self.settings.weight_decay
        return [
            *(reference.missed_steps_decay(beta, missed) for beta in self.settings.betas),
            reference.missed_steps_decay(shrink, missed + 1),
        ]

    def _on_host(self, store: Store, update: RowUpdate, first_row: int) -> None:
        in_bf16 = store["rows"].dtype == torch.bfloat16
        table = host_columns(store, "rows")
        scale, eps = np.float32(update.scale), np.float32(self.settings.eps)

        def parts(part: slice) -> tuple[np.ndarray, ...]:
            starts = update.segments.starts[part.start : part.stop + 1]
            return update.rows[part], update.segments.order, starts, update.gradients

        rounding: tuple[Any, ...] = ()
        if in_bf16:
            rounding = (first_row, self._step_stream(update.step), self.settings.stochastic_rounding)
        if self.settings.name == "rowwise_adagrad":
            adagrad = kernels.adagrad_bf16 if in_bf16 else kernels.adagrad_fp32
            second, rate = host_columns(store, "second_moment"), np.float32(update.learning_rate)
            self._threads.run(
                len(update.rows),
                lambda part: adagrad(*table, *second, *parts(part), scale, rate, eps, *rounding),
            )
            return
        adam, step = kernels.adam_bf16 if in_bf16 else kernels.adam_fp32, self._adam_step(update)
        first, second = host_columns(store, "first_moment"), host_columns(store, "second_moment")
        decays = [factors.reshape(-1) for factors in self._decays(store, update)]
        scalars = [
            np.float32(value) for value in (1 - step.beta1, 1 - step.beta2, step.inverse_root, step.eps, step.step_size)
        ]
        self._threads.run(
            len(update.rows),
            lambda part: adam(
                *table,
                *first,
                *second,
                *parts(part),
                *(factors[part] for factors in decays),
                scale,
                *scalars,
                *rounding,
            ),
        )

    def _on_device(self, store: Store, update: RowUpdate, first_row: int) -> None:
        table = store["rows"]
        rows = torch.from_numpy(update.rows).to(table.device)
        gradients = torch.from_numpy(update.gradients).to(table.device) * update.scale
        weights = table[rows].float()
        if self.settings.name == "rowwise_adagrad":
            weights, second = reference.rowwise_adagrad(
                weights, gradients, store["second_moment"][rows], update.learning_rate, self.settings.eps
            )
            moments = {"second_moment": second}
        else:
            factors = [torch.from_numpy(factor).to(table.device) for factor in self._decays(store, update)]
            weights, first, second = reference.adam(
                weights,
                gradients,
                store["first_moment"][rows],
                store["second_moment"][rows],
                (factors[0], factors[1], factors[2]),
                self._adam_step(update),
            )
            moments = {"first_moment": first, "second_moment": second}
        for name, values in moments.items():
            store[name][rows] = values
        write_rows(table, rows, weights, self._noise(update.rows, first_row, update))
