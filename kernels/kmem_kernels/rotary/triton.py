"""One program per block of heads, each of whose values is read at its own place and at its partner's."""

import triton
import triton.language as tl
from torch import Tensor

from ..backend import interpreted, launching, operator

# Shape letters: N tokens, h heads, D width of a head.

BLOCK_VALUES = 2048
"""With 128 threads, a thread holds 16 values."""


@triton.jit
def _rotate(
    x_ptr,  # [N, h, D]
    cos_ptr,  # fp32 [N, D]
    sin_ptr,  # fp32 [N, HALF]
    out_ptr,  # [N, h, D], contiguous
    rows,  # N * h
    HEADS: tl.constexpr,
    TOKEN_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    DIRECTION: tl.constexpr,
    BLOCK: tl.constexpr,
    PADDED: tl.constexpr,  # WIDTH, padded
):
    row = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[:, None]
    place = tl.arange(0, PADDED)[None, :]
    live = (row < rows) & (place < WIDTH)
    token, head = row // HEADS, row % HEADS
    turns = live & (place < 2 * HALF)
    partner = tl.where(place < HALF, place + HALF, place - HALF)
    x_ptr += token * TOKEN_STRIDE + head * HEAD_STRIDE
    x = tl.load(x_ptr + place, mask=live, other=0.0).to(tl.float32)
    other = tl.load(x_ptr + partner, mask=turns, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + token * WIDTH + place, mask=live, other=0.0)
    sin = tl.load(sin_ptr + token * HALF + place % HALF, mask=turns, other=0.0)
    sign = tl.where(place < HALF, -DIRECTION, DIRECTION).to(tl.float32)
    out = x * cos + sign * other * sin
    tl.store(out_ptr + row * WIDTH + place, out.to(out_ptr.dtype.element_ty), mask=live)


@operator
def rotary(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    """`reference.rotated`; the values of a head must be adjacent in memory."""
    tokens, heads, width = x.shape
    out = x.new_empty(tokens, heads, width)
    if launching(out):
        padded = triton.next_power_of_2(width)
        block = max(1, (1 << 16 if interpreted() else BLOCK_VALUES) // padded)
        _rotate[(triton.cdiv(tokens * heads, block),)](
            x,
            cos,
            sin,
            out,
            tokens * heads,
            HEADS=heads,
            TOKEN_STRIDE=x.stride(0),
            HEAD_STRIDE=x.stride(1),
            WIDTH=width,
            HALF=sin.shape[1],
            DIRECTION=direction,
            BLOCK=block,
            PADDED=padded,
        )
    return out
