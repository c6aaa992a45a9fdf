"""Copies tokens to rows sorted by expert, and sums weighted rows back to tokens, with gradients.

Deterministic, without atomics. `row_of_choice_TK` holds the row of choice k of token t; no two choices share a row.
Rows without a choice are padding: `permute` sets them to zero, and `combine` and its gradient never read them.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backend import Backend, chosen
from . import reference

# Shape letters: T tokens, K experts per token, N >= T * K rows, H hidden size.


def sort_by_expert(experts_TK: Tensor, num_experts: int, backend: Backend | None = None) -> tuple[Tensor, Tensor]:
    """Sort the choices by expert, then by token; returns int64 (choice_of_row_N, row_of_choice_TK) with N = T * K.

    choice_of_row_N: the choice t * K + k at each row; row_of_choice_TK: the row of each choice (t, k).

    Args:
        experts_TK: int64, each at least 0 and below `num_experts`.
        backend: default `triton` for CUDA tensors, else `torch`.
    """
    if chosen(backend, experts_TK) == "torch":
        return reference.sort_by_expert(experts_TK)
    from .triton import sort_by_expert as kernel

    return kernel(experts_TK, num_experts)


def permute(
    hidden_TH: Tensor, row_of_choice_TK: Tensor, num_rows: int | None = None, backend: Backend | None = None
) -> Tensor:
    """The token of every row, [N, H]. The gradient of a token is the sum of its rows' gradients, in the order of its
    choices.

    Args:
        row_of_choice_TK: int64.
        num_rows: N, if there is padding; default T * K.
        backend: default `triton` for CUDA tensors, else `torch`.

    Raises:
        ValueError: fewer rows than choices.
    """
    num_rows = row_of_choice_TK.numel() if num_rows is None else num_rows
    _check(num_rows, row_of_choice_TK)
    if chosen(backend, hidden_TH) == "torch":
        return reference.permute(hidden_TH, row_of_choice_TK, num_rows)
    return _Permute.apply(hidden_TH, row_of_choice_TK, num_rows)


def combine(rows_NH: Tensor, weights_TK: Tensor, row_of_choice_TK: Tensor, backend: Backend | None = None) -> Tensor:
    """The weighted sum of each token's rows, [T, H] in the rows' dtype; products and sums in fp32 (fp64 for fp64 rows).

    Args:
        weights_TK: any float dtype.
        row_of_choice_TK: int64.
        backend: default `triton` for CUDA tensors, else `torch`.

    Raises:
        ValueError: fewer rows than choices.
    """
    _check(len(rows_NH), row_of_choice_TK)
    if chosen(backend, rows_NH) == "torch":
        return reference.combine(rows_NH, weights_TK, row_of_choice_TK)
    return _Combine.apply(rows_NH, weights_TK, row_of_choice_TK)


def _check(num_rows: int, row_of_choice_TK: Tensor) -> None:
    if num_rows < row_of_choice_TK.numel():
        raise ValueError(f"{num_rows} rows cannot hold {row_of_choice_TK.numel()} choices")


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TH: Tensor, row_of_choice_TK: Tensor, num_rows: int) -> Tensor:
        from .triton import scatter

        ctx.save_for_backward(row_of_choice_TK)
        return scatter(hidden_TH, row_of_choice_TK, num_rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NH: Tensor) -> tuple[Tensor, None, None]:
        from .triton import gather_sum

        (row_of_choice_TK,) = ctx.saved_tensors
        return gather_sum(grad_NH, None, row_of_choice_TK), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_NH: Tensor, weights_TK: Tensor, row_of_choice_TK: Tensor) -> Tensor:
        from .triton import gather_sum

        ctx.save_for_backward(rows_NH, weights_TK, row_of_choice_TK)
        return gather_sum(rows_NH, weights_TK, row_of_choice_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor, Tensor, None]:
        from .triton import combine_backward

        return *combine_backward(grad_TH, *ctx.saved_tensors), None
