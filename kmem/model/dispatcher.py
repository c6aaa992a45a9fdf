"""Dispatch of tokens to their experts, and combination of the experts' outputs."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .experts import Experts
from .kernels import kernels_serve, kmem_kernels
from .router import Routing

# Shape letters: T tokens, K experts per token, N = T * K rows, H hidden size, E experts.


Shared = Callable[[Tensor], Tensor]
"""The shared experts, which every token visits beside its chosen ones: [T, H] -> [T, H]."""


Routes = Callable[[Tensor, Experts, Shared | None], Tensor]
"""(hidden [T, H], experts, shared) -> [T, H]: carries the tokens of one routing to their experts and back, and returns
the weighted sum of the chosen experts' outputs for every token, plus its `shared` output. Passes with the same choice
share one object."""

Dispatcher = Callable[[Routing], Routes]
"""Where a MoE layer runs its experts: the routes of a routing, with everything that can be computed from the choices,
before any token moves."""


def dispatch_locally(routing: Routing) -> Routes:
    """All experts on this device: sort rows by expert, run the experts, combine. Dropless and deterministic."""
    choice_of_row_N, row_of_choice_TK = sort_by_expert(routing.experts_TK, len(routing.counts_E))

    def routes(hidden_TH: Tensor, experts: Experts, shared: Shared | None) -> Tensor:
        rows_NH = gather_rows(hidden_TH, choice_of_row_N, row_of_choice_TK)
        out_NH = experts(rows_NH, routing.counts_E)
        out_TH = combine_rows(out_NH, routing.weights_TK, choice_of_row_N, row_of_choice_TK)
        return out_TH if shared is None else out_TH + shared(hidden_TH)

    return routes


def sort_by_expert(experts_TK: Tensor, num_experts: int | None = None) -> tuple[Tensor, Tensor]:
    """Sort the choices by expert, then by token; returns int64 (choice_of_row_N, row_of_choice_TK).

    choice_of_row_N: the choice t * K + k at each row; row_of_choice_TK: the row of each choice (t, k). With
    `num_experts`, the CUDA kernel counts instead of sorting; the result is the same.
    """
    if num_experts is not None and kernels_serve(experts_TK):
        return kmem_kernels.permute.op.sort_by_expert(experts_TK, num_experts, backend="triton")
    choice_of_row_N = experts_TK.flatten().argsort(stable=True)
    row_of_choice_TK = torch.empty_like(choice_of_row_N).scatter_(
        0, choice_of_row_N, torch.arange(len(choice_of_row_N), device=choice_of_row_N.device)
    )
    return choice_of_row_N, row_of_choice_TK.view_as(experts_TK)


def gather_rows(hidden_TH: Tensor, choice_of_row_N: Tensor, row_of_choice_TK: Tensor) -> Tensor:
    """The token of every row, [N, H]."""
    if kernels_serve(hidden_TH):
        return kmem_kernels.permute.op.permute(hidden_TH, row_of_choice_TK, backend="triton")
    return _Gather.apply(hidden_TH, choice_of_row_N, row_of_choice_TK)


def combine_rows(rows_NH: Tensor, weights_TK: Tensor, choice_of_row_N: Tensor, row_of_choice_TK: Tensor) -> Tensor:
    """The weighted sum of each token's rows, [T, H] in the rows' dtype; products and sums in fp32."""
    if kernels_serve(rows_NH):
        return kmem_kernels.permute.op.combine(rows_NH, weights_TK, row_of_choice_TK, backend="triton")
    return _Combine.apply(rows_NH, weights_TK, choice_of_row_N, row_of_choice_TK)


class _Gather(torch.autograd.Function):
    """Forward and backward are both gathers: a token's gradient is read from its K rows, so no two threads add to the
    same address."""

    @staticmethod
    def forward(ctx, hidden_TH: Tensor, choice_of_row_N: Tensor, row_of_choice_TK: Tensor) -> Tensor:
        ctx.save_for_backward(row_of_choice_TK)
        return hidden_TH.index_select(0, choice_of_row_N // row_of_choice_TK.shape[1])

    @staticmethod
    def backward(ctx, grad_NH: Tensor) -> tuple[Tensor, None, None]:
        (row_of_choice_TK,) = ctx.saved_tensors
        return F.embedding_bag(row_of_choice_TK, grad_NH, mode="sum"), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_NH: Tensor, weights_TK: Tensor, choice_of_row_N: Tensor, row_of_choice_TK: Tensor) -> Tensor:
        ctx.save_for_backward(rows_NH, weights_TK, choice_of_row_N, row_of_choice_TK)
        if rows_NH.dtype == weights_TK.dtype:
            return F.embedding_bag(row_of_choice_TK, rows_NH, mode="sum", per_sample_weights=weights_TK)
        # embedding_bag needs the weights in the rows' dtype.
        out_TH = weights_TK.new_zeros(len(weights_TK), rows_NH.shape[1])
        for place_T, weight_T in zip(row_of_choice_TK.unbind(1), weights_TK.unbind(1), strict=True):
            out_TH += rows_NH.index_select(0, place_T) * weight_T[:, None]
        return out_TH.to(rows_NH.dtype)

    @staticmethod
    def backward(ctx, grad_TH: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        rows_NH, weights_TK, choice_of_row_N, row_of_choice_TK = ctx.saved_tensors
        grad_NH = grad_weights = None
        token_N = choice_of_row_N // row_of_choice_TK.shape[1]
        weight_N = weights_TK.flatten().index_select(0, choice_of_row_N)
        if rows_NH.dtype == weights_TK.dtype:
            # One pass each, without a tensor of products: the first touch of its memory would cost more than the
            # arithmetic.
            grad_NH = F.embedding_bag(token_N[:, None], grad_TH, mode="sum", per_sample_weights=weight_N[:, None])
            if ctx.needs_input_grad[1]:
                grad_weights = _dots(grad_TH, rows_NH, row_of_choice_TK).view_as(weights_TK)
        else:
            taken_NH = grad_TH.index_select(0, token_N).to(weights_TK.dtype)
            grad_NH = (taken_NH * weight_N[:, None]).to(rows_NH.dtype)
            if ctx.needs_input_grad[1]:
                dots_N = taken_NH.mul_(rows_NH).sum(-1)
                grad_weights = dots_N.index_select(0, row_of_choice_TK.flatten()).view_as(weights_TK)
        return grad_NH, grad_weights, None, None


def _dots(grad_TH: Tensor, rows_NH: Tensor, row_of_choice_TK: Tensor) -> Tensor:
    """Dot products of each token's gradient with each of its rows, [T * K]: embedding_bag's gradient of its
    weights."""
    tokens, choices = row_of_choice_TK.shape
    token_N = torch.arange(tokens, device=row_of_choice_TK.device).repeat_interleave(choices)
    starts_T = torch.arange(0, tokens * choices, choices, device=row_of_choice_TK.device)
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        grad_TH.contiguous(), rows_NH, row_of_choice_TK.flatten(), starts_T, token_N, 0
    )
