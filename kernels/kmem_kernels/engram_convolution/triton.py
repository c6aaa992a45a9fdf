"""The forward pass reads its input once for the norm and once, with the taps, for the output. The backward pass
computes the sums of taps again, writes their gradient, and gathers it back over the tokens that read a token. What is
summed over tokens is summed per block of them, and then over the blocks in order. There are no atomics.

Tap k of a token t is the token t - k * dilation of its sequence, if that is in the same document.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import launching, operator
from ..tiling import block_tiling, row_tiling

# Shape letters: N tokens of all sequences, M branches, D hidden size, K taps, S blocks of tokens.


@triton.jit
def _scales(
    x_ptr,  # [N, M, D]
    scales_ptr,  # fp32 [N, M]: inverse RMS
    eps,
    M: tl.constexpr,
    HIDDEN: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    branch = tl.arange(0, Q)
    squares = tl.zeros((Q, BLOCK_HIDDEN), tl.float32)
    for start in range(0, HIDDEN, BLOCK_HIDDEN):
        place = start + tl.arange(0, BLOCK_HIDDEN)
        live = (branch < M)[:, None] & (place < HIDDEN)[None, :]
        at = token * M * HIDDEN + branch[:, None] * HIDDEN + place[None, :]
        x = tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32)
        squares += x * x
    scale = 1 / tl.sqrt(tl.sum(squares, 1) / HIDDEN + eps)
    tl.store(scales_ptr + token * M + branch, scale, mask=branch < M)


@triton.jit
def _reads(token, other, documents_ptr, tokens, LENGTH: tl.constexpr, BY_DOCUMENT: tl.constexpr):
    """Whether two tokens are of one sequence and, with BY_DOCUMENT, of one document; shaped as `other`."""
    reads = (other >= 0) & (other < tokens) & (token // LENGTH == other // LENGTH)
    if BY_DOCUMENT:
        document = tl.load(documents_ptr + token)
        reads = reads & (tl.load(documents_ptr + other, mask=reads, other=0) == document)
    return reads


@triton.jit
def _normed(x_ptr, scales_ptr, token, reads, branch, at, live, M: tl.constexpr, HIDDEN: tl.constexpr):
    """x times its inverse RMS, [Q, BLOCK_HIDDEN]; 0 where `reads` is False."""
    x = tl.load(x_ptr + token * M * HIDDEN + at, mask=live & reads, other=0.0).to(tl.float32)
    return x * tl.load(scales_ptr + token * M + branch[:, None], mask=(branch < M)[:, None] & reads, other=0.0)


@triton.jit
def _sum_of_taps(
    x_ptr, scales_ptr, norm, taps_ptr, documents_ptr, token, tokens, branch, at, live,
    DILATION: tl.constexpr, TAPS: tl.constexpr, LENGTH: tl.constexpr, BY_DOCUMENT: tl.constexpr,
    M: tl.constexpr, HIDDEN: tl.constexpr, Q: tl.constexpr, BLOCK_HIDDEN: tl.constexpr,
):  # fmt: skip
    """The convolution of the normed input at one token, [Q, BLOCK_HIDDEN]."""
    total = tl.zeros((Q, BLOCK_HIDDEN), tl.float32)
    for tap in tl.static_range(TAPS):
        other = token - tap * DILATION + 0 * branch[:, None]
        reads = _reads(token, other, documents_ptr, tokens, LENGTH, BY_DOCUMENT)
        weight = tl.load(taps_ptr + tap * M * HIDDEN + at, mask=live, other=0.0)
        total += weight * norm * _normed(x_ptr, scales_ptr, other, reads, branch, at, live, M, HIDDEN)
    return total


@triton.jit
def _convolved(
    x_ptr,  # [N, M, D]
    scales_ptr,  # fp32 [N, M]
    norm_ptr,  # fp32 [M, D]
    taps_ptr,  # fp32 [K, M, D]: tap 0 is the token itself
    documents_ptr,  # int64 [N]
    out_ptr,  # [N, M, D]
    tokens,
    DILATION: tl.constexpr,
    TAPS: tl.constexpr,
    LENGTH: tl.constexpr,
    BY_DOCUMENT: tl.constexpr,
    M: tl.constexpr,
    HIDDEN: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    blocks: tl.constexpr = (HIDDEN + BLOCK_HIDDEN - 1) // BLOCK_HIDDEN
    token = (tl.program_id(0) // blocks).to(tl.int64)
    branch = tl.arange(0, Q)
    place = tl.program_id(0) % blocks * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    live = (branch < M)[:, None] & (place < HIDDEN)[None, :]
    at = branch[:, None] * HIDDEN + place[None, :]
    norm = tl.load(norm_ptr + at, mask=live, other=0.0)
    total = _sum_of_taps(
        x_ptr, scales_ptr, norm, taps_ptr, documents_ptr, token, tokens, branch, at, live,
        DILATION, TAPS, LENGTH, BY_DOCUMENT, M, HIDDEN, Q, BLOCK_HIDDEN,
    )  # fmt: skip
    x = tl.load(x_ptr + token * M * HIDDEN + at, mask=live, other=0.0).to(tl.float32)
    out = x + total * tl.sigmoid(total)
    tl.store(out_ptr + token * M * HIDDEN + at, out.to(out_ptr.dtype.element_ty), mask=live)


@triton.jit
def _sums_backward(
    grad_ptr,  # [N, M, D]
    x_ptr,  # [N, M, D]
    scales_ptr,  # fp32 [N, M]
    norm_ptr,  # fp32 [M, D]
    taps_ptr,  # fp32 [K, M, D]
    documents_ptr,  # int64 [N]
    grad_sums_ptr,  # fp32 [N, M, D]: the gradient of the sums over taps
    parts_ptr,  # fp32 [S, K, M, D]
    tokens,
    block_tokens,
    DILATION: tl.constexpr,
    TAPS: tl.constexpr,
    PADDED: tl.constexpr,  # TAPS, padded
    LENGTH: tl.constexpr,
    BY_DOCUMENT: tl.constexpr,
    M: tl.constexpr,
    HIDDEN: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    branch = tl.arange(0, Q)
    place = tl.program_id(0) * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    live = (branch < M)[:, None] & (place < HIDDEN)[None, :]
    at = branch[:, None] * HIDDEN + place[None, :]
    norm = tl.load(norm_ptr + at, mask=live, other=0.0)
    number = tl.arange(0, PADDED)[:, None, None]
    parts = tl.zeros((PADDED, Q, BLOCK_HIDDEN), tl.float32)
    first = tl.program_id(1).to(tl.int64) * block_tokens
    for token in range(first, tl.minimum(first + block_tokens, tokens)):
        total = _sum_of_taps(
            x_ptr, scales_ptr, norm, taps_ptr, documents_ptr, token, tokens, branch, at, live,
            DILATION, TAPS, LENGTH, BY_DOCUMENT, M, HIDDEN, Q, BLOCK_HIDDEN,
        )  # fmt: skip
        sigmoid = tl.sigmoid(total)
        grad = tl.load(grad_ptr + token * M * HIDDEN + at, mask=live, other=0.0).to(tl.float32)
        grad = grad * sigmoid * (1 + total * (1 - sigmoid))
        tl.store(grad_sums_ptr + token * M * HIDDEN + at, grad.to(grad_sums_ptr.dtype.element_ty), mask=live)
        for tap in tl.static_range(TAPS):
            other = token - tap * DILATION + 0 * branch[:, None]
            reads = _reads(token, other, documents_ptr, tokens, LENGTH, BY_DOCUMENT)
            product = grad * norm * _normed(x_ptr, scales_ptr, other, reads, branch, at, live, M, HIDDEN)
            parts += tl.where(number == tap, product[None, :, :], 0.0)
    out = parts_ptr + (tl.program_id(1).to(tl.int64) * TAPS + number) * M * HIDDEN + at[None, :, :]
    tl.store(out, parts, mask=(number < TAPS) & live[None, :, :])


@triton.jit
def _grad_normed(
    grad_sums_ptr, taps_ptr, documents_ptr, token, tokens, at, live,
    DILATION: tl.constexpr, TAPS: tl.constexpr, LENGTH: tl.constexpr, BY_DOCUMENT: tl.constexpr,
    M: tl.constexpr, HIDDEN: tl.constexpr, Q: tl.constexpr, BLOCK_HIDDEN: tl.constexpr,
):  # fmt: skip
    """The gradient of the normed input: from all tokens that read this one."""
    grad = tl.zeros((Q, BLOCK_HIDDEN), tl.float32)
    for tap in tl.static_range(TAPS):
        other = token + tap * DILATION + 0 * tl.arange(0, Q)[:, None]
        reads = _reads(token, other, documents_ptr, tokens, LENGTH, BY_DOCUMENT)
        weight = tl.load(taps_ptr + tap * M * HIDDEN + at, mask=live, other=0.0)
        grad += weight * tl.load(grad_sums_ptr + other * M * HIDDEN + at, mask=live & reads, other=0.0).to(tl.float32)
    return grad


@triton.jit
def _norm_dots(
    x_ptr,  # [N, M, D]
    scales_ptr,  # fp32 [N, M]
    norm_ptr,  # fp32 [M, D]
    taps_ptr,  # fp32 [K, M, D]
    documents_ptr,  # int64 [N]
    grad_sums_ptr,  # fp32 [N, M, D]
    dots_ptr,  # fp32 [N, M]: mean over D of the gradient times the normed input
    tokens,
    DILATION: tl.constexpr,
    TAPS: tl.constexpr,
    LENGTH: tl.constexpr,
    BY_DOCUMENT: tl.constexpr,
    M: tl.constexpr,
    HIDDEN: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    branch = tl.arange(0, Q)
    products = tl.zeros((Q, BLOCK_HIDDEN), tl.float32)
    for start in range(0, HIDDEN, BLOCK_HIDDEN):
        place = start + tl.arange(0, BLOCK_HIDDEN)
        live = (branch < M)[:, None] & (place < HIDDEN)[None, :]
        at = branch[:, None] * HIDDEN + place[None, :]
        grad = _grad_normed(
            grad_sums_ptr, taps_ptr, documents_ptr, token, tokens, at, live,
            DILATION, TAPS, LENGTH, BY_DOCUMENT, M, HIDDEN, Q, BLOCK_HIDDEN,
        )  # fmt: skip
        norm = tl.load(norm_ptr + at, mask=live, other=0.0)
        products += grad * norm * tl.load(x_ptr + token * M * HIDDEN + at, mask=live, other=0.0).to(tl.float32)
    scale = tl.load(scales_ptr + token * M + branch, mask=branch < M, other=0.0)
    tl.store(dots_ptr + token * M + branch, tl.sum(products, 1) * scale / HIDDEN, mask=branch < M)


@triton.jit
def _inputs_backward(
    grad_ptr,  # [N, M, D]
    x_ptr,  # [N, M, D]
    scales_ptr,  # fp32 [N, M]
    norm_ptr,  # fp32 [M, D]
    taps_ptr,  # fp32 [K, M, D]
    documents_ptr,  # int64 [N]
    grad_sums_ptr,  # fp32 [N, M, D]
    dots_ptr,  # fp32 [N, M]
    grad_x_ptr,  # [N, M, D]
    parts_ptr,  # fp32 [S, M, D]
    tokens,
    block_tokens,
    DILATION: tl.constexpr,
    TAPS: tl.constexpr,
    LENGTH: tl.constexpr,
    BY_DOCUMENT: tl.constexpr,
    M: tl.constexpr,
    HIDDEN: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    branch = tl.arange(0, Q)
    place = tl.program_id(0) * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    live = (branch < M)[:, None] & (place < HIDDEN)[None, :]
    at = branch[:, None] * HIDDEN + place[None, :]
    norm = tl.load(norm_ptr + at, mask=live, other=0.0)
    part = tl.zeros((Q, BLOCK_HIDDEN), tl.float32)
    first = tl.program_id(1).to(tl.int64) * block_tokens
    for token in range(first, tl.minimum(first + block_tokens, tokens)):
        grad = _grad_normed(
            grad_sums_ptr, taps_ptr, documents_ptr, token, tokens, at, live,
            DILATION, TAPS, LENGTH, BY_DOCUMENT, M, HIDDEN, Q, BLOCK_HIDDEN,
        )  # fmt: skip
        scale = tl.load(scales_ptr + token * M + branch, mask=branch < M, other=0.0)[:, None]
        dot = tl.load(dots_ptr + token * M + branch, mask=branch < M, other=0.0)[:, None]
        x = tl.load(x_ptr + token * M * HIDDEN + at, mask=live, other=0.0).to(tl.float32) * scale
        # With n = x r: dx = r (g w - n mean(g w n)).
        grad_x = tl.load(grad_ptr + token * M * HIDDEN + at, mask=live, other=0.0).to(tl.float32)
        grad_x += scale * (grad * norm - x * dot)
        tl.store(grad_x_ptr + token * M * HIDDEN + at, grad_x.to(grad_x_ptr.dtype.element_ty), mask=live)
        part += grad * x
    tl.store(parts_ptr + tl.program_id(1).to(tl.int64) * M * HIDDEN + at, part, mask=live)


@operator
def engram_convolved(
    x: Tensor, norm: Tensor, taps: Tensor, documents: Tensor | None, eps: float, dilation: int, length: int
) -> tuple[Tensor, Tensor]:
    """`reference.convolved` for x [N, M, D] of sequences of `length` tokens, and the inverse RMS [N, M].

    Args:
        norm: fp32 [M, D].
        taps: fp32 [K, M, D], the token itself first.
        documents: int64 [N].
    """
    tokens, branches, hidden = x.shape
    out, scales = torch.empty_like(x), x.new_empty(tokens, branches, dtype=torch.float32)
    if launching(out):
        _scales[(tokens,)](x, scales, eps, **row_tiling(x))
        tiling = row_tiling(x)
        given = {**_sizes(taps, documents, dilation, length), **tiling}
        grid = (tokens * triton.cdiv(hidden, tiling["BLOCK_HIDDEN"]),)
        _convolved[grid](x, scales, norm, taps, x if documents is None else documents, out, tokens, **given)
    return out, scales


@operator
def engram_convolved_backward(
    grad: Tensor, x: Tensor, scales: Tensor, norm: Tensor, taps: Tensor, documents: Tensor | None, dilation: int,
    length: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of x, norm and taps."""
    tokens = len(x)
    grad_x = torch.empty_like(x)
    grid, block_tokens, tiling = block_tiling(x, most=2)
    tap_parts = norm.new_empty(grid[1], *taps.shape)
    norm_parts = norm.new_empty(grid[1], *norm.shape)
    if not launching(grad):
        return grad_x, norm_parts.zero_().sum(0), tap_parts.zero_().sum(0)
    grad_sums, dots = torch.empty_like(x, dtype=torch.float32), torch.empty_like(scales)
    sizes = _sizes(taps, documents, dilation, length)
    inputs = (x, scales, norm, taps, x if documents is None else documents)
    _sums_backward[grid](
        grad, *inputs, grad_sums, tap_parts, tokens, block_tokens,
        PADDED=triton.next_power_of_2(len(taps)), **sizes, **tiling,
    )  # fmt: skip
    _norm_dots[(tokens,)](*inputs, grad_sums, dots, tokens, **sizes, **row_tiling(x, most=4))
    grid, block_tokens, tiling = block_tiling(x)
    norm_parts = norm_parts[: grid[1]]
    _inputs_backward[grid](grad, *inputs, grad_sums, dots, grad_x, norm_parts, tokens, block_tokens, **sizes, **tiling)
    return grad_x, norm_parts.sum(0), tap_parts.sum(0)


def _sizes(taps: Tensor, documents: Tensor | None, dilation: int, length: int) -> dict[str, object]:
    return {"DILATION": dilation, "TAPS": len(taps), "LENGTH": length, "BY_DOCUMENT": documents is not None}
