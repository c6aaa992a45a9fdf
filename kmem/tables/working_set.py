"""The rows of one step on the compute device: each unique row once, one index per micro-batch, one gradient buffer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kmem.config import UserError
from kmem.tables.row_optimizers import kernels
from kmem.tables.segments import Segments
from kmem.tables.stores import CHUNK_BYTES

# Shape letters: M micro-batches, U unique rows of a step, u rows of a micro-batch, D values of a row.


@dataclass(frozen=True)
class StepPlan:
    """The rows of a table that a step reads on this rank.

    Args:
        rows: [U] int64, ascending and distinct.
        index: for each micro-batch, an int64 tensor of any shape on the host: the place in `rows` of every lookup.
    """

    rows: np.ndarray
    index: Sequence[Tensor]

    @classmethod
    def of(cls, ids: Sequence[Tensor] | Tensor) -> "StepPlan":
        """The plan for row ids, int64 on the host: one tensor of any shape per micro-batch, or one tensor [M, ..].

        Raises:
            UserError: an id is negative.
        """
        flat = torch.cat([part.flatten() for part in ids]).numpy()
        if len(flat) and flat.min() < 0:
            raise UserError(f"row ids start at 0, but {flat.min()} was looked up")
        segments = Segments.of(flat)
        inverse = torch.from_numpy(segments.inverse()).split([part.numel() for part in ids])
        return cls(segments.unique, [places.view(part.shape) for places, part in zip(inverse, ids, strict=True)])

    @property
    def look_ups(self) -> int:
        """Number of lookups of all micro-batches."""
        return sum(index.numel() for index in self.index)


class WorkingSet:
    """The rows that a step looks up, and the sum of their gradients over all micro-batches.

    The rows are a leaf tensor outside every module and optimizer. A lookup records an autograd function that adds into
    `gradient` in place: a dense [U, D] gradient per lookup would cost several times the lookup itself.

    Args:
        rows: [U, D] fp32, on the compute device.
        index: the index of the step's plan, on the compute device.
        trainable: False for evaluation: lookups are then not recorded for autograd.
        asked: [U], the numbers of the rows in the table, if anyone needs them later.
    """

    def __init__(
        self, rows: Tensor, index: Sequence[Tensor], trainable: bool = True, asked: np.ndarray | None = None
    ) -> None:
        self.rows = rows.requires_grad_(trainable)
        self.index = index
        self.asked = np.zeros(0, np.int64) if asked is None else asked
        self.gradient: Tensor | None = None
        """[U, D] fp32; None until a backward pass has reached a lookup."""

    def lookup(self, micro_batch: int) -> Tensor:
        """[.., D] fp32: the rows of a micro-batch, in the shape of its index. Cast the result, not the rows, so that
        the gradients of all micro-batches are summed in fp32."""
        return _Read.apply(self.rows, self.index[micro_batch], slice(None), self.accumulate)

    def columns(self, micro_batch: int, start: int, stop: int) -> Tensor:
        """[u, stop - start] fp32: columns of the rows of a micro-batch, whose index must be [u] without repetition. For
        rows whose columns belong to several layers."""
        part = slice(start, stop)
        return _Read.apply(self.rows, self.index[micro_batch], part, partial(self.accumulate_columns, part))

    def weighted(self, micro_batch: int, weights: Tensor) -> Tensor:
        """[N, D] fp32: for each of N tokens, the sum of its rows with weights fp32 [N, ..], in the shape of the index
        of the micro-batch."""
        return _Weighted.apply(weights, self, self.index[micro_batch])

    def finite(self) -> Tensor:
        """bool scalar on the device: True if no gradient is infinite or NaN. (inf and NaN survive the sum.)"""
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
            # On a device, index_add_ uses atomics, in no fixed order.
            from kmem_kernels.segment_reduce.op import segment_reduce, segments_of

            segment_reduce(gradient, *segments_of(index, len(total)), total)

    def accumulate_columns(self, columns: slice, rows: Tensor, gradient: Tensor) -> None:
        """Add the gradient [u, stop - start] of columns [start, stop) of `rows` [u]. The rows are distinct, so each
        value gets one addition per call, and the order of additions is the order of the backward passes."""
        self._total()[:, columns].index_add_(0, rows, gradient.float())

    def _total(self) -> Tensor:
        if self.gradient is None:
            self.gradient = torch.zeros_like(self.rows, requires_grad=False)
        return self.gradient


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, columns: slice, accumulate: Callable[..., None]) -> Tensor:
        ctx.accumulate = accumulate
        ctx.save_for_backward(index)
        values = rows[:, columns]
        return values.index_select(0, index.reshape(-1)).view(*index.shape, values.shape[1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None, None]:
        (index,) = ctx.saved_tensors
        ctx.accumulate(index, gradient)
        return None, None, None, None


class _Weighted(torch.autograd.Function):
    """Holds the rows of a few tokens at a time: those of all tokens would be many times larger than the working set."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, working_set: WorkingSet, index: Tensor) -> Tensor:
        ctx.working_set = working_set
        ctx.save_for_backward(weights, index)
        bags = index.flatten(1), weights.detach().flatten(1)
        return F.embedding_bag(bags[0], working_set.rows.detach(), per_sample_weights=bags[1], mode="sum")

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        weights, index = ctx.saved_tensors
        working_set, dim = ctx.working_set, gradient.shape[1]
        rows, flat, factors = working_set.rows.detach(), index.flatten(1), weights.flatten(1)
        grad_weights = torch.empty_like(factors)
        tokens = max(1, CHUNK_BYTES // (8 * dim * flat.shape[1]))
        for start in range(0, len(flat), tokens):
            part = slice(start, start + tokens)
            grad_weights[part] = torch.einsum("nkd,nd->nk", rows[flat[part]], gradient[part])
            if working_set.rows.requires_grad:
                working_set.accumulate(flat[part], factors[part][..., None] * gradient[part][:, None])
        return grad_weights.view_as(weights), None, None
