"""One program per block of tokens. It walks the K places of its tokens, so each token is read or written once.

So the gather of N = T * K rows moves T + N rows instead of 2 N. No two programs write the same row, and one program
sums all rows of a token, in the order of the token's choices. There are no atomics, and rows that belong to no token
are not touched.

The places come from a counting sort: count how often each expert occurs in each block of choices, take a running sum
over experts and then blocks, and add the rank of a choice among the equal choices of its block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import interpreted, launching, operator

# Shape letters: T tokens, K experts per token, N >= T * K rows, H hidden size.

BLOCK_TOKENS = 4
BLOCK_HIDDEN = 512
"""With 4 tokens and 128 threads, a thread holds 16 values of each array: two loads of 16 bytes in bf16."""

BLOCK_CHOICES = 128
"""Choices per program; all pairs of them are compared."""


@triton.jit
def _count_choices(
    experts_ptr,  # int64 [N]
    counts_ptr,  # int32 [E, blocks], zeros
    choices,
    BLOCK: tl.constexpr,
):
    choice = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(experts_ptr + choice, mask=choice < choices, other=-1).to(tl.int32)
    equal = (expert[:, None] == expert[None, :]).to(tl.int32)
    # Equal choices store the same number at the same address.
    counts = counts_ptr + expert * tl.num_programs(0) + tl.program_id(0)
    tl.store(counts, tl.sum(equal, 1), mask=choice < choices)


@triton.jit
def _place_choices(
    experts_ptr,  # int64 [N]
    counts_ptr,  # int32 [E, blocks]
    ends_ptr,  # int32 [E, blocks]: running sum of the counts
    order_ptr,  # int64 [N]
    place_ptr,  # int64 [N]
    choices,
    BLOCK: tl.constexpr,
):
    slot = tl.arange(0, BLOCK)
    choice = tl.program_id(0) * BLOCK + slot
    live = choice < choices
    expert = tl.load(experts_ptr + choice, mask=live, other=-1).to(tl.int32)
    earlier = (expert[:, None] == expert[None, :]) & (slot[None, :] < slot[:, None])
    cell = expert * tl.num_programs(0) + tl.program_id(0)
    start = tl.load(ends_ptr + cell, mask=live, other=0) - tl.load(counts_ptr + cell, mask=live, other=0)
    place = (start + tl.sum(earlier.to(tl.int32), 1)).to(tl.int64)
    tl.store(place_ptr + choice, place, mask=live)
    tl.store(order_ptr + place, choice.to(tl.int64), mask=live)


@triton.jit
def _scatter(
    hidden_ptr,  # [T, H]
    place_ptr,  # int64 [T, K]
    rows_ptr,  # [N, H], of hidden's dtype
    tokens,
    TOP_K: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    token = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[:, None]
    token_live = token < tokens
    for start in range(0, HIDDEN, BLOCK_HIDDEN):
        column = start + tl.arange(0, BLOCK_HIDDEN)[None, :]
        live = token_live & (column < HIDDEN)
        values = tl.load(hidden_ptr + token * HIDDEN + column, mask=live)
        for k in tl.static_range(TOP_K):
            place = tl.load(place_ptr + token * TOP_K + k, mask=token_live, other=0)
            tl.store(rows_ptr + place * HIDDEN + column, values, mask=live)


@triton.jit
def _gather_sum(
    rows_ptr,  # [N, H]
    weights_ptr,  # [T, K], read if HAS_WEIGHTS
    place_ptr,  # int64 [T, K]
    out_ptr,  # [T, H], of the rows' dtype
    tokens,
    TOP_K: tl.constexpr,
    HIDDEN: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    token = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[:, None]
    token_live = token < tokens
    for start in range(0, HIDDEN, BLOCK_HIDDEN):
        column = start + tl.arange(0, BLOCK_HIDDEN)[None, :]
        live = token_live & (column < HIDDEN)
        total = tl.zeros((BLOCK, BLOCK_HIDDEN), WIDE)
        for k in tl.static_range(TOP_K):
            place = tl.load(place_ptr + token * TOP_K + k, mask=token_live, other=0)
            values = tl.load(rows_ptr + place * HIDDEN + column, mask=live, other=0.0).to(WIDE)
            if HAS_WEIGHTS:
                values *= tl.load(weights_ptr + token * TOP_K + k, mask=token_live, other=0.0).to(WIDE)
            total += values
        tl.store(out_ptr + token * HIDDEN + column, total.to(out_ptr.dtype.element_ty), mask=live)


@triton.jit
def _combine_backward(
    grad_ptr,  # [T, H]
    rows_ptr,  # [N, H]
    weights_ptr,  # [T, K]
    place_ptr,  # int64 [T, K]
    grad_rows_ptr,  # [N, H], of the rows' dtype
    grad_weights_ptr,  # [T, K], of the weights' dtype
    tokens,
    TOP_K: tl.constexpr,
    HIDDEN: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    token = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[:, None]
    token_live = token < tokens
    for k in range(TOP_K):  # from the second choice on, the token's gradient comes from the cache
        choice = token * TOP_K + k
        place = tl.load(place_ptr + choice, mask=token_live, other=0)
        weight = tl.load(weights_ptr + choice, mask=token_live, other=0.0).to(WIDE)
        products = tl.zeros((BLOCK, BLOCK_HIDDEN), WIDE)
        for start in range(0, HIDDEN, BLOCK_HIDDEN):
            column = start + tl.arange(0, BLOCK_HIDDEN)[None, :]
            live = token_live & (column < HIDDEN)
            grad = tl.load(grad_ptr + token * HIDDEN + column, mask=live, other=0.0).to(WIDE)
            products += grad * tl.load(rows_ptr + place * HIDDEN + column, mask=live, other=0.0).to(WIDE)
            grad_row = (grad * weight).to(grad_rows_ptr.dtype.element_ty)
            tl.store(grad_rows_ptr + place * HIDDEN + column, grad_row, mask=live)
        dots = tl.sum(products, 1)[:, None].to(grad_weights_ptr.dtype.element_ty)
        tl.store(grad_weights_ptr + choice, dots, mask=token_live)


@operator
def sort_by_expert(experts_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """`reference.sort_by_expert`, number for number."""
    experts_TK = experts_TK.contiguous()
    choices, device = experts_TK.numel(), experts_TK.device
    assert choices < 2**31, f"{choices} choices"
    choice_of_row_N = torch.empty(choices, dtype=torch.int64, device=device)
    row_of_choice_TK = torch.empty_like(experts_TK)
    if launching(row_of_choice_TK):
        block = 512 if interpreted() else BLOCK_CHOICES
        blocks = triton.cdiv(choices, block)
        counts = torch.zeros(num_experts, blocks, dtype=torch.int32, device=device)
        _count_choices[(blocks,)](experts_TK, counts, choices, BLOCK=block)
        ends = counts.flatten().cumsum(0, dtype=torch.int32)
        _place_choices[(blocks,)](experts_TK, counts, ends, choice_of_row_N, row_of_choice_TK, choices, BLOCK=block)
    return choice_of_row_N, row_of_choice_TK


@operator
def scatter(hidden_TH: Tensor, row_of_choice_TK: Tensor, num_rows: int) -> Tensor:
    """`reference.permute`, bit for bit: rows [N, H], each with its token; zeros for rows without a token."""
    hidden_TH, row_of_choice_TK = hidden_TH.contiguous(), row_of_choice_TK.contiguous()
    rows_NH = _rows(row_of_choice_TK, num_rows, hidden_TH)
    if launching(rows_NH) and row_of_choice_TK.numel():
        grid, tiling = _tiling(hidden_TH)
        _scatter[grid](
            hidden_TH,
            row_of_choice_TK,
            rows_NH,
            len(hidden_TH),
            TOP_K=row_of_choice_TK.shape[1],
            HIDDEN=hidden_TH.shape[1],
            **tiling,
        )
    return rows_NH


@operator
def gather_sum(rows_NH: Tensor, weights_TK: Tensor | None, row_of_choice_TK: Tensor) -> Tensor:
    """`reference.combine`; without weights, the sum of each token's rows."""
    rows_NH, row_of_choice_TK = rows_NH.contiguous(), row_of_choice_TK.contiguous()
    out_TH = rows_NH.new_empty(len(row_of_choice_TK), rows_NH.shape[1])
    if launching(out_TH):
        grid, tiling = _tiling(out_TH)
        _gather_sum[grid](
            rows_NH,
            rows_NH if weights_TK is None else weights_TK.contiguous(),
            row_of_choice_TK,
            out_TH,
            len(out_TH),
            TOP_K=row_of_choice_TK.shape[1],
            HIDDEN=out_TH.shape[1],
            HAS_WEIGHTS=weights_TK is not None,
            WIDE=_wide(rows_NH),
            **tiling,
        )
    return out_TH


@operator
def combine_backward(
    grad_TH: Tensor, rows_NH: Tensor, weights_TK: Tensor, row_of_choice_TK: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the rows [N, H] (zeros for rows without a token) and of the weights [T, K]."""
    grad_TH, rows_NH = grad_TH.contiguous(), rows_NH.contiguous()
    weights_TK, row_of_choice_TK = weights_TK.contiguous(), row_of_choice_TK.contiguous()
    grad_rows_NH = _rows(row_of_choice_TK, len(rows_NH), rows_NH)
    grad_weights_TK = torch.zeros_like(weights_TK) if grad_TH.numel() == 0 else torch.empty_like(weights_TK)
    if launching(grad_TH):
        grid, tiling = _tiling(grad_TH)
        _combine_backward[grid](
            grad_TH,
            rows_NH,
            weights_TK,
            row_of_choice_TK,
            grad_rows_NH,
            grad_weights_TK,
            len(grad_TH),
            TOP_K=row_of_choice_TK.shape[1],
            HIDDEN=grad_TH.shape[1],
            WIDE=_wide(rows_NH),
            **tiling,
        )
    return grad_rows_NH, grad_weights_TK


def _rows(row_of_choice_TK: Tensor, num_rows: int, like: Tensor) -> Tensor:
    """An output [N, H] for a kernel; cleared only if some rows belong to no token."""
    new = like.new_empty if num_rows == row_of_choice_TK.numel() else like.new_zeros
    return new(num_rows, like.shape[1])


def _tiling(of_tokens: Tensor) -> tuple[tuple[int], dict[str, int]]:
    tokens, hidden = of_tokens.shape
    block = 64 if interpreted() else BLOCK_TOKENS
    return (triton.cdiv(tokens, block),), {
        "BLOCK": block,
        "BLOCK_HIDDEN": min(triton.next_power_of_2(hidden), BLOCK_HIDDEN),
    }


def _wide(values: Tensor) -> tl.dtype:
    return tl.float64 if values.dtype == torch.float64 else tl.float32
