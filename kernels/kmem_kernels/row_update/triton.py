"""One program per tile: a few rows with all their columns, or some columns of a wide row, which has several programs.
Values that all programs of a row read are written after the kernel has finished.

Compiled without contraction (`enable_fp_fusion=False`): a fused multiply-add rounds once, but the host rounds twice.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import counter_random
from ..backend import interpreted
from .op import CatchUp, Gradients, OwnSteps, RandomRounding
from .reference import SQUARES_LANES, SQUARES_PART, AdamStep

# Shape letters: R rows of D values in the table, U of them touched, W contributions to their gradients.

BLOCK_VALUES = 512
"""Values per tile, which has two warps, so a thread holds 8 values of each array. Rows of up to 512 values are one tile
wide."""

_GOLDEN = tl.constexpr(int(counter_random.GOLDEN))
_MIX_1, _MIX_2 = tl.constexpr(int(counter_random.MIX_1)), tl.constexpr(int(counter_random.MIX_2))
_FP32, _NEAREST, _RANDOM = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _gradient(values_ptr, order_ptr, begin, length, column, live, COLUMNS: tl.constexpr, SUM: tl.constexpr):
    """The gradients of rows [BLOCK, 1] at columns [1, n]: a row's only contribution, or the sum of its contributions,
    added to zero in order."""
    if SUM:
        source = tl.load(order_ptr + begin, mask=length > 0, other=0)
        total = tl.load(values_ptr + source * COLUMNS + column, mask=live, other=0.0)
        # A single contribution of -0.0 keeps its sign; a sum starts from zero, so its first term -0.0 becomes 0.0.
        total = tl.where(length > 1, total + 0.0, total)
        for step in range(1, tl.max(length)):
            more = step < length
            source = tl.load(order_ptr + begin + step, mask=more, other=0)
            value = tl.load(values_ptr + source * COLUMNS + column, mask=more & live, other=0.0)
            total = tl.where(more, total + value, total)
    else:
        total = tl.load(values_ptr + begin * COLUMNS + column, mask=live, other=0.0)
    return total


@triton.jit
def _contributions(starts_ptr, index, live, SUM: tl.constexpr):
    """The place of the first contribution of each row, and the number of contributions."""
    if SUM:
        begin = tl.load(starts_ptr + index, mask=live, other=0)
        length = tl.load(starts_ptr + index + 1, mask=live, other=0) - begin
    else:
        begin = index
        length = live.to(tl.int64)
    return begin, length


@triton.jit
def _squares(
    values_ptr, order_ptr, begin, length, live, scale, COLUMNS: tl.constexpr, SUM: tl.constexpr, BLOCK: tl.constexpr
):
    """fp64 [BLOCK, 1]: sums of the squares of the scaled gradients, from left to right. The squares are exact in
    fp64."""
    total = tl.zeros((BLOCK, 1), tl.float64)
    for column in range(COLUMNS):
        g = _gradient(values_ptr, order_ptr, begin, length, column, live, COLUMNS, SUM) * scale
        total += g.to(tl.float64) * g.to(tl.float64)
    return total


@triton.jit
def _read(weights_ptr, at, live, ROUNDING: tl.constexpr):
    if ROUNDING == _FP32:
        return tl.load(weights_ptr + at, mask=live, other=0.0)
    else:
        bits = tl.load(weights_ptr + at, mask=live, other=0).to(tl.uint16, bitcast=True)
        return (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _write(weights_ptr, at, values, counter, stream, live, ROUNDING: tl.constexpr):
    """Store values, rounded if the weights are bf16. counter: uint64, the values' numbers in the random stream."""
    if ROUNDING == _FP32:
        tl.store(weights_ptr + at, values, mask=live)
    else:
        bits = values.to(tl.uint32, bitcast=True)
        if ROUNDING == _RANDOM:
            z = stream.to(tl.uint64) + (counter + 1) * _GOLDEN
            z = (z ^ (z >> 30)) * _MIX_1
            z = (z ^ (z >> 27)) * _MIX_2
            bits += ((z ^ (z >> 31)) & 0xFFFF).to(tl.uint32)
        else:
            bits += 0x7FFF + ((bits >> 16) & 1)
        tl.store(weights_ptr + at, (bits >> 16).to(tl.uint16).to(tl.int16, bitcast=True), mask=live)


@triton.jit(do_not_specialize=["step", "first_row", "stream"])
def _adam(
    weights_ptr,  # [R, D] fp32, or int16: the bits of bf16
    first_ptr,  # fp32 [R, D]
    second_ptr,  # fp32 [R, D]
    last_step_ptr,  # int32 [R], used if CATCH_UP
    decays_ptr,  # fp32 [3, decays], used if CATCH_UP
    updates_ptr,  # int32 [R], used if OWN_STEPS
    corrections_ptr,  # fp32 [corrections], used if OWN_STEPS
    rows_ptr,  # int64 [U]
    values_ptr,  # fp32 [W, D]
    order_ptr,  # int64 [W], used if SUM
    starts_ptr,  # int64 [U + 1], used if SUM
    count,
    decays,
    corrections,
    step,
    first_row,
    stream,  # int64 with the bits of a uint64: Triton would choose the type of a uint64 by its value
    scale,
    rate_m,
    rate_v,
    inverse_root,
    eps,
    size,
    decay,  # used if DECAY
    COLUMNS: tl.constexpr,
    CATCH_UP: tl.constexpr,
    OWN_STEPS: tl.constexpr,
    DECAY: tl.constexpr,
    SUM: tl.constexpr,
    ROUNDING: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    tiles: tl.constexpr = (COLUMNS + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    program = tl.program_id(0).to(tl.int64)
    index = (program // tiles * BLOCK + tl.arange(0, BLOCK))[:, None]
    row_live = index < count
    row = tl.load(rows_ptr + index, mask=row_live, other=0)
    begin, length = _contributions(starts_ptr, index, row_live, SUM)
    column = ((program % tiles).to(tl.int32) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS))[None, :]
    live = row_live & (column < COLUMNS)
    at = row * COLUMNS + column
    w = _read(weights_ptr, at, live, ROUNDING)
    m = tl.load(first_ptr + at, mask=live, other=0.0)
    v = tl.load(second_ptr + at, mask=live, other=0.0)
    g = _gradient(values_ptr, order_ptr, begin, length, column, live, COLUMNS, SUM) * scale
    if CATCH_UP:
        missed = tl.maximum(step - 1 - tl.load(last_step_ptr + row, mask=row_live, other=0), 0)
        m = m * tl.load(decays_ptr + missed, mask=row_live, other=1.0)
        v = v * tl.load(decays_ptr + decays + missed, mask=row_live, other=1.0)
        w = w * tl.load(decays_ptr + 2 * decays + missed, mask=row_live, other=1.0)
    if DECAY:
        w = w * decay
    if OWN_STEPS:
        before = tl.minimum(tl.load(updates_ptr + row, mask=row_live, other=0), corrections - 1)
        size = tl.load(corrections_ptr + before, mask=row_live, other=1.0) * size
    m = m + (g - m) * rate_m
    v = v + (g * g - v) * rate_v
    w = w - tl.div_rn(m, tl.sqrt_rn(v) * inverse_root + eps) * size
    tl.store(first_ptr + at, m, mask=live)
    tl.store(second_ptr + at, v, mask=live)
    counter = (first_row + row).to(tl.uint64) * COLUMNS + column.to(tl.uint64)
    _write(weights_ptr, at, w, counter, stream, live, ROUNDING)


@triton.jit(do_not_specialize=["first_row", "stream"])
def _rowwise_adagrad(
    weights_ptr,  # [R, D] fp32, or int16: the bits of bf16
    second_ptr,  # fp32 [R]
    rows_ptr,  # int64 [U]
    values_ptr,  # fp32 [W, D]
    order_ptr,  # int64 [W], used if SUM
    starts_ptr,  # int64 [U + 1], used if SUM
    count,
    first_row,
    stream,  # int64: the bits of a uint64
    scale,
    rate,
    eps,
    COLUMNS: tl.constexpr,
    SUM: tl.constexpr,
    ROUNDING: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    index = (tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK))[:, None]
    row_live = index < count
    row = tl.load(rows_ptr + index, mask=row_live, other=0)
    begin, length = _contributions(starts_ptr, index, row_live, SUM)
    # This brings the gradients into the cache, from which the tiles below read them again.
    squares = _squares(values_ptr, order_ptr, begin, length, row_live, scale, COLUMNS, SUM, BLOCK)
    second = tl.load(second_ptr + row, mask=row_live, other=0.0) + (squares / COLUMNS).to(tl.float32)
    tl.debug_barrier()  # every warp has read the accumulator before it is written
    tl.store(second_ptr + row, second, mask=row_live)
    root = tl.sqrt_rn(second) + eps
    for start in range(0, COLUMNS, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)[None, :]
        live = row_live & (column < COLUMNS)
        at = row * COLUMNS + column
        g = _gradient(values_ptr, order_ptr, begin, length, column, live, COLUMNS, SUM) * scale
        w = _read(weights_ptr, at, live, ROUNDING) - tl.div_rn(g, tl.broadcast_to(root, g.shape)) * rate
        counter = (first_row + row).to(tl.uint64) * COLUMNS + column.to(tl.uint64)
        _write(weights_ptr, at, w, counter, stream, live, ROUNDING)


@triton.jit
def _square_norms(
    values_ptr,  # fp32 [U, D]
    sums_ptr,  # fp64 [U, parts]
    count,
    COLUMNS: tl.constexpr,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    FOLDS: tl.constexpr,  # LANES = 2^FOLDS
):
    parts: tl.constexpr = (COLUMNS + PART - 1) // PART
    program = tl.program_id(0).to(tl.int64)
    index = (program // parts * BLOCK + tl.arange(0, BLOCK))[:, None]
    live = index < count
    first = (program % parts).to(tl.int32) * PART
    total = tl.zeros((BLOCK, LANES), tl.float64)
    for start in range(first, tl.minimum(first + PART, COLUMNS), LANES):
        column = start + tl.arange(0, LANES)[None, :]
        g = tl.load(values_ptr + index * COLUMNS + column, mask=live & (column < COLUMNS), other=0.0).to(tl.float64)
        total += g * g
    for fold in tl.static_range(FOLDS):
        one, other = tl.split(tl.reshape(total, (BLOCK, LANES >> (fold + 1), 2)))
        total = one + other
    tl.store(sums_ptr + index * parts + program % parts, tl.reshape(total, (BLOCK, 1)), mask=live)


def adam_(
    weights_RD: Tensor,
    first_RD: Tensor,
    second_RD: Tensor,
    gradients: Gradients,
    step: AdamStep,
    catch_up: CatchUp | None,
    rounding: RandomRounding | None,
    decay: float = 1.0,
    own: OwnSteps | None = None,
) -> None:
    """`reference.adam_`, bit for bit."""
    launch = _launch(weights_RD, gradients, rounding)
    if launch is None:
        return
    (blocks,), arrays, numbers, options = launch
    _adam[(blocks * triton.cdiv(weights_RD.shape[1], options["BLOCK_COLUMNS"]),)](
        _bits(weights_RD),
        first_RD,
        second_RD,
        first_RD if catch_up is None else catch_up.last_step,
        first_RD if catch_up is None else catch_up.decays.contiguous(),
        first_RD if own is None else own.updates,
        first_RD if own is None else own.corrections,
        *arrays,
        len(gradients.rows),
        0 if catch_up is None else catch_up.decays.shape[1],
        0 if own is None else len(own.corrections),
        0 if catch_up is None else catch_up.step,
        *numbers,
        gradients.scale,
        1 - step.beta1,
        1 - step.beta2,
        step.inverse_root,
        step.eps,
        step.step_size,
        decay,
        CATCH_UP=catch_up is not None,
        OWN_STEPS=own is not None,
        DECAY=decay != 1.0,
        **options,
    )
    rows = gradients.rows
    if catch_up is not None:
        catch_up.last_step[rows] = catch_up.step
    if own is not None:
        own.updates[rows] += 1


def rowwise_adagrad_(
    weights_RD: Tensor,
    second_R1: Tensor,
    gradients: Gradients,
    learning_rate: float,
    eps: float,
    rounding: RandomRounding | None,
) -> None:
    """`reference.rowwise_adagrad_`, bit for bit."""
    launch = _launch(weights_RD, gradients, rounding)
    if launch is None:
        return
    grid, arrays, numbers, options = launch
    _rowwise_adagrad[grid](
        _bits(weights_RD),
        second_R1,
        *arrays,
        len(gradients.rows),
        *numbers,
        gradients.scale,
        learning_rate,
        eps,
        **options,
    )


def square_norms(values_UD: Tensor) -> Tensor:
    """`reference.square_norms`, bit for bit."""
    values_UD = values_UD.contiguous()
    count, columns = values_UD.shape
    if not values_UD.numel():
        return torch.zeros(count, dtype=torch.float64, device=values_UD.device)
    parts = triton.cdiv(columns, SQUARES_PART)
    lanes = min(triton.next_power_of_2(columns), SQUARES_LANES)
    block = 128 if interpreted() else max(1, BLOCK_VALUES // lanes)
    sums_UP = torch.empty(count, parts, dtype=torch.float64, device=values_UD.device)
    _square_norms[(triton.cdiv(count, block) * parts,)](
        values_UD,
        sums_UP,
        count,
        COLUMNS=columns,
        PART=SQUARES_PART,
        BLOCK=block,
        LANES=lanes,
        FOLDS=lanes.bit_length() - 1,
        num_warps=2,
    )
    while sums_UP.shape[1] > 1:
        if sums_UP.shape[1] % 2:
            sums_UP = torch.nn.functional.pad(sums_UP, (0, 1))
        sums_UP = sums_UP[:, ::2] + sums_UP[:, 1::2]
    return sums_UP[:, 0]


def _bits(weights: Tensor) -> Tensor:
    return weights.view(torch.int16) if weights.dtype == torch.bfloat16 else weights


def _launch(
    weights: Tensor, gradients: Gradients, rounding: RandomRounding | None
) -> tuple[tuple[int], tuple[Tensor, ...], tuple[int, int], dict[str, Any]] | None:
    """The grid, the arrays of the gradients, the numbers for rounding, and the constants; None if there is nothing to
    do."""
    count, columns = len(gradients.rows), weights.shape[1]
    if count == 0 or columns == 0:
        return None
    rows, summed = gradients.rows.contiguous(), gradients.order is not None
    order, starts = (rows if array is None else array.contiguous() for array in (gradients.order, gradients.starts))
    block_columns = min(triton.next_power_of_2(columns), BLOCK_VALUES)
    block = 128 if interpreted() else BLOCK_VALUES // block_columns
    kind = _FP32 if weights.dtype == torch.float32 else _NEAREST if rounding is None else _RANDOM
    stream, first_row = (0, 0) if rounding is None else (rounding.stream, rounding.first_row)
    signed = stream - (1 << 64) if stream >> 63 else stream
    options = {
        "COLUMNS": columns,
        "SUM": summed,
        "ROUNDING": kind.value,
        "BLOCK": block,
        "BLOCK_COLUMNS": block_columns,
        "num_warps": 2,
        "enable_fp_fusion": False,
    }
    return (
        (triton.cdiv(count, block),),
        (rows, gradients.values.contiguous(), order, starts),
        (first_row, signed),
        options,
    )
