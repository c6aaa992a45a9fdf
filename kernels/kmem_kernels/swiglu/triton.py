"""Elementwise kernels over blocks of rows and columns, which read and write each value once. Gate and up have separate
row strides, so they may be the two halves of one matrix."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import interpreted, launching, operator

# Shape letters: N rows, I width.

BLOCK_ROWS = 8
BLOCK_COLUMNS = 256
"""With 8 rows and 128 threads, a thread holds 16 values of each array: two loads of 16 bytes in bf16."""


@triton.jit
def _silu_times(
    gate_ptr,  # [N, I]
    up_ptr,  # [N, I]
    out_ptr,  # [N, I], contiguous
    rows,
    GATE_STRIDE: tl.constexpr,  # row stride; fixed by the model, like the width
    UP_STRIDE: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    column_blocks: tl.constexpr = (COLUMNS + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    row = (tl.program_id(0) // column_blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]
    column = tl.program_id(0) % column_blocks * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
    live = (row < rows) & (column < COLUMNS)
    gate = tl.load(gate_ptr + row * GATE_STRIDE + column, mask=live, other=0.0).to(WIDE)
    up = tl.load(up_ptr + row * UP_STRIDE + column, mask=live, other=0.0).to(WIDE)
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + row * COLUMNS + column, out.to(out_ptr.dtype.element_ty), mask=live)


@triton.jit
def _silu_times_backward(
    grad_ptr,  # [N, I], contiguous
    gate_ptr,  # [N, I]
    up_ptr,  # [N, I]
    grad_gate_ptr,  # [N, I]
    grad_up_ptr,  # [N, I]
    rows,
    GATE_STRIDE: tl.constexpr,
    UP_STRIDE: tl.constexpr,
    GRAD_STRIDE: tl.constexpr,  # row stride of both output gradients
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    column_blocks: tl.constexpr = (COLUMNS + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    row = (tl.program_id(0) // column_blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]
    column = tl.program_id(0) % column_blocks * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
    live = (row < rows) & (column < COLUMNS)
    grad = tl.load(grad_ptr + row * COLUMNS + column, mask=live, other=0.0).to(WIDE)
    gate = tl.load(gate_ptr + row * GATE_STRIDE + column, mask=live, other=0.0).to(WIDE)
    up = tl.load(up_ptr + row * UP_STRIDE + column, mask=live, other=0.0).to(WIDE)
    sigmoid = tl.sigmoid(gate)
    # d(g s)/dg = s + g s (1 - s) with s = sigmoid(g).
    grad_gate = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
    place = row * GRAD_STRIDE + column
    tl.store(grad_gate_ptr + place, grad_gate.to(grad_gate_ptr.dtype.element_ty), mask=live)
    tl.store(grad_up_ptr + place, (grad * gate * sigmoid).to(grad_up_ptr.dtype.element_ty), mask=live)


@operator
def silu_times(gate_NI: Tensor, up_NI: Tensor) -> Tensor:
    """`reference.silu_times`."""
    gate_NI, up_NI = _with_rows(gate_NI), _with_rows(up_NI)
    out_NI = torch.empty_like(gate_NI, memory_format=torch.contiguous_format)
    if launching(out_NI):
        grid, tiling = _tiling(out_NI)
        strides = {"GATE_STRIDE": gate_NI.stride(0), "UP_STRIDE": up_NI.stride(0)}
        _silu_times[grid](gate_NI, up_NI, out_NI, len(out_NI), **strides, **tiling)
    return out_NI


@operator
def silu_times_backward(grad_NI: Tensor, gate_NI: Tensor, up_NI: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up."""
    grad_gate_NI = torch.empty_like(gate_NI, memory_format=torch.contiguous_format)
    grad_up_NI = torch.empty_like(grad_gate_NI)
    _write_gradients(grad_NI, gate_NI, up_NI, grad_gate_NI, grad_up_NI)
    return grad_gate_NI, grad_up_NI


@operator
def swiglu_backward(grad_NI: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient [N, 2I] of gate and up in one matrix."""
    grad = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
    _write_gradients(grad_NI, *gate_up.chunk(2, dim=1), *grad.chunk(2, dim=1))
    return grad


def _write_gradients(grad_NI: Tensor, gate_NI: Tensor, up_NI: Tensor, grad_gate_NI: Tensor, grad_up_NI: Tensor) -> None:
    grad_NI, gate_NI, up_NI = grad_NI.contiguous(), _with_rows(gate_NI), _with_rows(up_NI)
    if launching(grad_NI):
        grid, tiling = _tiling(grad_NI)
        _silu_times_backward[grid](
            grad_NI,
            gate_NI,
            up_NI,
            grad_gate_NI,
            grad_up_NI,
            len(grad_NI),
            GATE_STRIDE=gate_NI.stride(0),
            UP_STRIDE=up_NI.stride(0),
            GRAD_STRIDE=grad_gate_NI.stride(0),
            **tiling,
        )


def _with_rows(values: Tensor) -> Tensor:
    """The tensor, copied if the values of a row are not adjacent in memory."""
    return values if values.stride(1) == 1 else values.contiguous()


def _tiling(values: Tensor) -> tuple[tuple[int], dict[str, object]]:
    rows, columns = values.shape
    block, widest = (64, 1024) if interpreted() else (BLOCK_ROWS, BLOCK_COLUMNS)
    block_columns = min(triton.next_power_of_2(columns), widest)
    return (triton.cdiv(rows, block) * triton.cdiv(columns, block_columns),), {
        "COLUMNS": columns,
        "WIDE": tl.float64 if values.dtype == torch.float64 else tl.float32,
        "BLOCK": block,
        "BLOCK_COLUMNS": block_columns,
    }
