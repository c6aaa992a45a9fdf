"""Row optimizers bound to a store: compiled loops where the rows are on the host, kernels on a device, of the same
bits. (Sinkhorn's momentum is several passes of torch operations in both.)"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kmem.config import RowOptimizerConfig
from kmem.tables import counter_random
from kmem.tables.row_optimizers import kernels, reference
from kmem.tables.row_optimizers.sinkhorn import DeviceSweep, HostSweep, Sweep, sinkhorn_step
from kmem.tables.row_optimizers.update import RowUpdate, host_columns, take_missed_steps, take_updates
from kmem.tables.row_threads import RowThreads
from kmem.tables.stores import ArrayLayout, Store


class RowOptimizer:
    """Updates rows and their state in place.

    Args:
        settings: the user's choices.
        dim: width of a row.
        seed: of the run; with `table` it seeds stochastic rounding.
        table: canonical name of the table.
        threads: they share the rows of a step.
        sum_over_ranks: adds up a small fp64 array over all ranks that share the table, in place.
        upload: makes tensors where the rows are of host arrays, for rows on a device; by default of the same memory.
    """

    def __init__(
        self,
        settings: RowOptimizerConfig,
        dim: int,
        seed: int,
        table: str,
        threads: RowThreads | None = None,
        sum_over_ranks: Callable[[np.ndarray], None] = lambda _: None,
        upload: Callable[..., list[Tensor]] | None = None,
    ) -> None:
        self.settings, self.dim = settings, dim
        self._threads, self._sum = threads or RowThreads(), sum_over_ranks
        self._upload = upload or _same_storage
        self._stream = counter_random.key(seed, table, "rounding")
        self._decay_table: tuple[tuple[int, float], Tensor] | None = None
        self._corrections = reference.own_corrections(*settings.betas) if settings.counts_updates else None
        self._uploaded_corrections: Tensor | None = None

    def state(self) -> dict[str, ArrayLayout]:
        """The arrays that each row needs beside itself."""
        vector, scalar = ArrayLayout(self.dim, torch.float32), ArrayLayout(1, torch.float32)
        match self.settings.name:
            case "lazy_adam":
                count = {"updates": ArrayLayout(1, torch.int32)} if self.settings.counts_updates else {}
                return {"first_moment": vector, "second_moment": vector, **count}
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
        if self.settings.clip_norm is not None or streamed:
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
        if isinstance(update.gradients, Tensor):
            from kmem_kernels.row_update.op import square_norms

            norms = square_norms(update.gradients).cpu().numpy()
        else:
            norms = kernels.square_norms(update.gradients)
        squares = np.array([norms.sum() * update.scale**2])
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
        fixed = (*self.settings.betas, self.settings.eps, update.learning_rate)
        if self.settings.counts_updates:
            return reference.AdamStep.own(*fixed)
        make = reference.AdamStep.lazy if self.settings.name == "lazy_adam" else reference.AdamStep.dense
        return make(*fixed, update.step)

    def _sizes(self, store: Store, update: RowUpdate, step: reference.AdamStep) -> np.ndarray:
        """fp32 [U]: the size of the step of each row; counts the update of rows that count theirs."""
        size = np.float32(step.step_size)
        if self._corrections is None:
            return np.full(len(update.rows), size)
        before = take_updates(store, update)
        return self._corrections[np.minimum(before, len(self._corrections) - 1)] * size

    def _decays(self, store: Store, update: RowUpdate) -> list[np.ndarray]:
        """[U, 1] fp32 factors on first moment, second moment and weight: those of missed steps, and this step's decay
        of weights; marks the rows as updated."""
        if self.settings.name == "lazy_adam":
            ones = np.ones((len(update.rows), 1), np.float32)
            return [ones, ones, ones * np.float32(self._shrink(update))]
        missed = take_missed_steps(store, update)
        return [
            *(reference.missed_steps_decay(beta, missed) for beta in self.settings.betas),
            reference.missed_steps_decay(self._shrink(update), missed + 1),
        ]

    def _shrink(self, update: RowUpdate) -> float:
        """Factor of a step's weight decay."""
        return 1 - update.learning_rate * self.settings.weight_decay

    def _on_host(self, store: Store, update: RowUpdate, first_row: int) -> None:
        in_bf16, gradients = store["rows"].dtype == torch.bfloat16, update.gradients
        assert isinstance(gradients, np.ndarray)
        table = host_columns(store, "rows")
        scale, eps = np.float32(update.scale), np.float32(self.settings.eps)

        def parts(part: slice) -> tuple[np.ndarray, ...]:
            starts = update.segments.starts[part.start : part.stop + 1]
            return update.rows[part], update.segments.order, starts, gradients

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
        scalars = [np.float32(value) for value in (1 - step.beta1, 1 - step.beta2, step.inverse_root, step.eps)]
        sizes = self._sizes(store, update, step)
        self._threads.run(
            len(update.rows),
            lambda part: adam(
                *table,
                *first,
                *second,
                *parts(part),
                *(factors[part] for factors in decays),
                sizes[part],
                scale,
                *scalars,
                *rounding,
            ),
        )

    def _on_device(self, store: Store, update: RowUpdate, first_row: int) -> None:
        from kmem_kernels.row_update.op import CatchUp, Gradients, OwnSteps, RandomRounding, adam_, rowwise_adagrad_

        segments = update.segments
        order, starts = None, None
        if update.one_each:
            (rows,) = self._upload(segments.unique)
        else:
            rows, order, starts = self._upload(segments.unique, segments.order, segments.starts)
        values = update.gradients if isinstance(update.gradients, Tensor) else self._upload(update.gradients)[0]
        gradients = Gradients(rows, values, update.scale, order, starts)
        rounding = None
        if self.settings.stochastic_rounding:
            rounding = RandomRounding(int(self._step_stream(update.step)), first_row)
        if self.settings.name == "rowwise_adagrad":
            rate, eps = update.learning_rate, self.settings.eps
            rowwise_adagrad_(store["rows"], store["second_moment"], gradients, rate, eps, rounding)
            return
        catch_up, own = None, None
        if self.settings.name == "adam_catchup":
            catch_up = CatchUp(store["last_step"], update.step, self._decays_after(update))
        if self._corrections is not None:
            if self._uploaded_corrections is None:
                (self._uploaded_corrections,) = self._upload(self._corrections)
            own = OwnSteps(store["updates"], self._uploaded_corrections)
        moments = store["first_moment"], store["second_moment"]
        decay = self._shrink(update) if catch_up is None else 1.0
        adam_(store["rows"], *moments, gradients, self._adam_step(update), catch_up, rounding, decay, own)

    def _decays_after(self, update: RowUpdate) -> Tensor:
        """[3, L] where the rows are: the factors of `_decays` for 0, 1, ... missed steps. Computed when the table has
        become too short for the step, and in every step in which the learning rate changes the decay of weights."""
        length = max(1024, 1 << update.step.bit_length())
        shrink = self._shrink(update)
        if self._decay_table is None or self._decay_table[0] != (length, shrink):
            missed = np.arange(length)
            factors = [(beta, missed) for beta in self.settings.betas] + [(shrink, missed + 1)]
            decays = np.stack([reference.missed_steps_decay(*factor).reshape(-1) for factor in factors])
            self._decay_table = (length, shrink), self._upload(decays)[0]
        return self._decay_table[1]


def _same_storage(*arrays: np.ndarray) -> list[Tensor]:
    return [torch.from_numpy(array) for array in arrays]
