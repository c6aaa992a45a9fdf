"""One program per token computes its scores; another kernel walks tokens in blocks and writes the gradients of the
streams, so that the weight's gradient is summed per block, and then over the blocks in order. There are no atomics."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import launching, operator
from ..tiling import block_tiling, row_tiling
from .reference import FLOOR

# Shape letters: N tokens, M branches, D hidden size, S blocks of tokens.

NUMBERS = 4
"""Saved per token and branch: the score before it is scaled, the inverse RMS of the branch and of its key, the gate."""


@triton.jit
def _gate(
    hidden_ptr,  # [N, M, D]
    keys_ptr,  # [N, M, D]
    value_ptr,  # [N, D]
    weight_ptr,  # fp32 [M, D]
    out_ptr,  # [N, M, D]
    numbers_ptr,  # fp32 [N, 4, M]
    eps,
    LEAST: tl.constexpr,
    M: tl.constexpr,
    HIDDEN: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    branch = tl.arange(0, Q)
    products = tl.zeros((Q, BLOCK_HIDDEN), tl.float32)
    hidden_squares = tl.zeros((Q, BLOCK_HIDDEN), tl.float32)
    key_squares = tl.zeros((Q, BLOCK_HIDDEN), tl.float32)
    for start in range(0, HIDDEN, BLOCK_HIDDEN):
        place = start + tl.arange(0, BLOCK_HIDDEN)
        live = (branch < M)[:, None] & (place < HIDDEN)[None, :]
        at = branch[:, None] * HIDDEN + place[None, :]
        hidden = tl.load(hidden_ptr + token * M * HIDDEN + at, mask=live, other=0.0).to(tl.float32)
        key = tl.load(keys_ptr + token * M * HIDDEN + at, mask=live, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + at, mask=live, other=0.0)
        products += hidden * weight * key
        hidden_squares += hidden * hidden
        key_squares += key * key
    raw = tl.sum(products, 1)
    hidden_scale = 1 / tl.sqrt(tl.sum(hidden_squares, 1) / HIDDEN + eps)
    key_scale = 1 / tl.sqrt(tl.sum(key_squares, 1) / HIDDEN + eps)
    score = raw * hidden_scale * key_scale * HIDDEN**-0.5
    root = tl.sqrt(tl.maximum(tl.abs(score), LEAST))
    gate = tl.sigmoid(tl.where(score > 0, root, tl.where(score < 0, -root, 0.0)))
    numbers_ptr += token * 4 * M + branch
    tl.store(numbers_ptr, raw, mask=branch < M)
    tl.store(numbers_ptr + M, hidden_scale, mask=branch < M)
    tl.store(numbers_ptr + 2 * M, key_scale, mask=branch < M)
    tl.store(numbers_ptr + 3 * M, gate, mask=branch < M)
    for start in range(0, HIDDEN, BLOCK_HIDDEN):
        place = start + tl.arange(0, BLOCK_HIDDEN)
        value = tl.load(value_ptr + token * HIDDEN + place, mask=place < HIDDEN, other=0.0).to(tl.float32)
        live = (branch < M)[:, None] & (place < HIDDEN)[None, :]
        at = token * M * HIDDEN + branch[:, None] * HIDDEN + place[None, :]
        tl.store(out_ptr + at, (gate[:, None] * value[None, :]).to(out_ptr.dtype.element_ty), mask=live)


@triton.jit
def _gate_scores_backward(
    grad_ptr,  # [N, M, D]
    value_ptr,  # [N, D]
    numbers_ptr,  # fp32 [N, 4, M]
    grad_value_ptr,  # [N, D]
    factors_ptr,  # fp32 [N, 3, M]
    LEAST: tl.constexpr,
    M: tl.constexpr,
    HIDDEN: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    branch = tl.arange(0, Q)
    numbers_ptr += token * 4 * M + branch
    raw = tl.load(numbers_ptr, mask=branch < M, other=0.0)
    hidden_scale = tl.load(numbers_ptr + M, mask=branch < M, other=0.0)
    key_scale = tl.load(numbers_ptr + 2 * M, mask=branch < M, other=0.0)
    gate = tl.load(numbers_ptr + 3 * M, mask=branch < M, other=0.0)
    products = tl.zeros((Q, BLOCK_HIDDEN), tl.float32)
    for start in range(0, HIDDEN, BLOCK_HIDDEN):
        place = start + tl.arange(0, BLOCK_HIDDEN)
        live = (branch < M)[:, None] & (place < HIDDEN)[None, :]
        at = token * M * HIDDEN + branch[:, None] * HIDDEN + place[None, :]
        grad = tl.load(grad_ptr + at, mask=live, other=0.0).to(tl.float32)
        value = tl.load(value_ptr + token * HIDDEN + place, mask=place < HIDDEN, other=0.0).to(tl.float32)
        products += grad * value[None, :]
        grad_value = tl.sum(gate[:, None] * grad, 0)
        tl.store(
            grad_value_ptr + token * HIDDEN + place, grad_value.to(grad_value_ptr.dtype.element_ty), mask=place < HIDDEN
        )
    # With z = s raw r_h r_k, d sqrt|z| / d raw = s r_h r_k / (2 sqrt|z|).
    scales = hidden_scale * key_scale * HIDDEN**-0.5
    size = tl.abs(raw) * scales
    slope = tl.sum(products, 1) * gate * (1 - gate) * 0.5 * scales / tl.sqrt(tl.maximum(size, LEAST))
    slope = tl.where(size < LEAST, 0.0, slope)
    factors_ptr += token * 3 * M + branch
    tl.store(factors_ptr, slope, mask=branch < M)
    tl.store(factors_ptr + M, slope * raw * hidden_scale * hidden_scale / HIDDEN, mask=branch < M)
    tl.store(factors_ptr + 2 * M, slope * raw * key_scale * key_scale / HIDDEN, mask=branch < M)


@triton.jit
def _gate_streams_backward(
    hidden_ptr,  # [N, M, D]
    keys_ptr,  # [N, M, D]
    weight_ptr,  # fp32 [M, D]
    factors_ptr,  # fp32 [N, 3, M]
    grad_hidden_ptr,  # [N, M, D]
    grad_keys_ptr,  # [N, M, D]
    parts_ptr,  # fp32 [S, M, D]
    tokens,
    block_tokens,
    M: tl.constexpr,
    HIDDEN: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    branch = tl.arange(0, Q)
    place = tl.program_id(0) * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    live = (branch < M)[:, None] & (place < HIDDEN)[None, :]
    at = branch[:, None] * HIDDEN + place[None, :]
    weight = tl.load(weight_ptr + at, mask=live, other=0.0)
    part = tl.zeros((Q, BLOCK_HIDDEN), tl.float32)
    first = tl.program_id(1).to(tl.int64) * block_tokens
    for token in range(first, tl.minimum(first + block_tokens, tokens)):
        hidden = tl.load(hidden_ptr + token * M * HIDDEN + at, mask=live, other=0.0).to(tl.float32)
        key = tl.load(keys_ptr + token * M * HIDDEN + at, mask=live, other=0.0).to(tl.float32)
        factors = factors_ptr + token * 3 * M + branch
        slope = tl.load(factors, mask=branch < M, other=0.0)[:, None]
        through_hidden = tl.load(factors + M, mask=branch < M, other=0.0)[:, None]
        through_key = tl.load(factors + 2 * M, mask=branch < M, other=0.0)[:, None]
        grad_hidden = slope * weight * key - through_hidden * hidden
        grad_key = slope * weight * hidden - through_key * key
        tl.store(grad_hidden_ptr + token * M * HIDDEN + at, grad_hidden.to(grad_hidden_ptr.dtype.element_ty), mask=live)
        tl.store(grad_keys_ptr + token * M * HIDDEN + at, grad_key.to(grad_keys_ptr.dtype.element_ty), mask=live)
        part += slope * hidden * key
    tl.store(parts_ptr + tl.program_id(1).to(tl.int64) * M * HIDDEN + at, part, mask=live)


@operator
def engram_gate(hidden: Tensor, keys: Tensor, value: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The gated value of `reference.branch_gate`, and NUMBERS of each token and branch, fp32 [N, 4, M]."""
    tokens, branches, _ = hidden.shape
    out = torch.empty_like(hidden, dtype=value.dtype)
    numbers = hidden.new_empty(tokens, NUMBERS, branches, dtype=torch.float32)
    if launching(out):
        tiling = row_tiling(hidden, most=4)
        _gate[(tokens,)](hidden, keys, value, weight, out, numbers, eps, LEAST=FLOOR, **tiling)
    return out, numbers


@operator
def engram_gate_backward(
    grad: Tensor, hidden: Tensor, keys: Tensor, value: Tensor, weight: Tensor, numbers: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of hidden, keys, value and weight."""
    tokens, branches, width = hidden.shape
    grad_hidden, grad_keys, grad_value = (torch.empty_like(x) for x in (hidden, keys, value))
    grid, block_tokens, tiling = block_tiling(hidden)
    parts = hidden.new_empty(grid[1], branches, width, dtype=torch.float32)
    if not launching(grad):
        return grad_hidden, grad_keys, grad_value, parts.zero_().sum(0)
    factors = numbers.new_empty(tokens, 3, branches)
    _gate_scores_backward[(tokens,)](
        grad, value, numbers, grad_value, factors, LEAST=FLOOR, **row_tiling(hidden, most=4)
    )
    _gate_streams_backward[grid](
        hidden, keys, weight, factors, grad_hidden, grad_keys, parts, tokens, block_tokens, **tiling
    )
    return grad_hidden, grad_keys, grad_value, parts.sum(0)
