"""The rows of one step on the compute device: unique rows once, an index per micro-batch, one gradient buffer.

M micro-batches; U unique rows of D values.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kmem.config import UserError
from kmem.tables.row_optimizers import kernels
from kmem.tables.segments import Segments


@dataclass(frozen=True)
class StepPlan:
    """The rows of a table that a step reads on this rank.

    Args:
        rows: [U] int64, ascending and distinct.
        index: for each micro-batch, int64 of any shape: the place of every look-up among `rows`. On the host.
    """

    rows: np.ndarray
    index: Sequence[Tensor]

    @classmethod
    def of(cls, ids: Sequence[Tensor] | Tensor) -> "StepPlan":
        """The plan for row ids, int64 on the host: for each micro-batch a tensor of any shape, or all of them [M, ..].

        Raises:
            UserError: an id is negative.
        """
        if isinstance(ids, Tensor):
            flat = ids.numpy().reshape(-1)
        else:
            flat = torch.cat([some.flatten() for some in ids]).numpy()
        if len(flat) and flat.min() < 0:
            raise UserError(f"row ids start at 0, and {flat.min()} was looked up")
        segments = Segments.of(flat)
        inverse = torch.from_numpy(segments.inverse()).split([some.numel() for some in ids])
        return cls(segments.unique, [part.view(some.shape) for part, some in zip(inverse, ids, strict=True)])

    @property
    def look_ups(self) -> int:
        """Of all micro-batches."""
        return sum(some.numel() for some in self.index)


class WorkingSet:
    """Rows that a step looks up, and the sum of their gradients over all micro-batches.

    The rows are a leaf tensor outside every module and optimizer. Looking rows up records an autograd function that
    adds into `gradient` in place: a dense [U, D] gradient per lookup would cost several times the lookup itself.

    Args:
        rows: [U, D] fp32, on the compute device.
        index: that of the step's plan, on the compute device.
        trainable: False for evaluation: lookups are then recorded nowhere.
    """

    def __init__(self, rows: Tensor, index: Sequence[Tensor], trainable: bool = True) -> None:
        self.rows = rows.requires_grad_(trainable)
        self.index = index
        self.gradient: Tensor | None = None
        """[U, D] fp32; None until a backward pass has reached a lookup."""

    def lookup(self, micro_batch: int) -> Tensor:
        """[.., D] fp32: the rows of a micro-batch, in the shape of its index. Cast after, not before: gradients of all
        micro-batches are then summed in fp32."""
        return _Lookup.apply(self.rows, self, self.index[micro_batch])

    def columns(self, micro_batch: int, start: int, stop: int) -> Tensor:
        """[u, stop - start] fp32: columns of the rows of a micro-batch whose index is [u] without repetition. For rows
        whose columns belong to several layers."""
        return _Columns.apply(self.rows, self, self.index[micro_batch], start, stop)

    def finite(self) -> Tensor:
        """bool scalar on the device: no gradient is infinite or NaN. (inf and NaN survive the sum.)"""
        if self.gradient is None:
            return torch.ones((), dtype=torch.bool, device=self.rows.device)
        return torch.isfinite(self.gradient.sum())

    def accumulate(self, index: Tensor, gradient: Tensor) -> None:
        """Add the gradient [..., D] of a lookup, in the order of its tokens."""
        total = self._total()
        index, gradient = index.reshape(-1), gradient.reshape(-1, self.rows.shape[1])
        if gradient.device.type == "cpu":
            kernels.add_segments(total.numpy(), index.numpy(), gradient.float().contiguous().numpy())
        else:
            # index_add_ adds atomically there, in any order.
            from kmem_kernels.segment_reduce.op import segment_reduce, segments_of

            segment_reduce(gradient, *segments_of(index, len(total)), total)

    def accumulate_columns(self, rows: Tensor, start: int, stop: int, gradient: Tensor) -> None:
        """Add the gradient [u, stop - start] of a part of some rows: one addition to each value, so that their order
        is that of the backward passes."""
        self._total()[:, start:stop].index_add_(0, rows, gradient.float())

    def _total(self) -> Tensor:
        if self.gradient is None:
            self.gradient = torch.zeros_like(self.rows, requires_grad=False)
        return self.gradient


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, working_set: WorkingSet, index: Tensor) -> Tensor:
        ctx.working_set = working_set
        ctx.save_for_backward(index)
        return rows.index_select(0, index.reshape(-1)).view(*index.shape, rows.shape[1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        (index,) = ctx.saved_tensors
        ctx.working_set.accumulate(index, gradient)
        return None, None, None


class _Columns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, working_set: WorkingSet, index: Tensor, start: int, stop: int) -> Tensor:
        ctx.working_set, ctx.part = working_set, (start, stop)
        ctx.save_for_backward(index)
        return rows[:, start:stop].index_select(0, index)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None, None, None]:
        (index,) = ctx.saved_tensors
        ctx.working_set.accumulate_columns(index, *ctx.part, gradient)
        return None, None, None, None, None
