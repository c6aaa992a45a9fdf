"""One kernel sums short segments, chunks of long ones, and at last the sums of these chunks."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import interpreted
from .reference import CHUNK

# Shape letters: N rows of D values, M of them in segments, U segments.

BLOCK_COLUMNS = 256
"""Columns of one program, a single warp: 8 in each thread. Most segments are a row or two, and warps that end on
their own do not wait for longer ones."""
UNROLL = 4
"""Rows that are requested before the first is added; additions keep their order."""


@triton.jit
def _running_sums(
    values_ptr,  # [N, D]
    order_ptr,  # int64 [M], read if HAS_ORDER
    first_ptr,  # int64 [U]
    end_ptr,  # int64 [U]
    sums_ptr,  # fp32 [U, D]; rows of segments whose length is not from SHORTEST to longest stay as they are
    segments,
    longest,  # depends on M, so not a constant: each would be compiled
    COLUMNS: tl.constexpr,
    SHORTEST: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    column_blocks: tl.constexpr = (COLUMNS + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    segment = (tl.program_id(0) // column_blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]
    column = tl.program_id(0) % column_blocks * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
    column_live = column < COLUMNS
    first = tl.load(first_ptr + segment, mask=segment < segments, other=0)
    length = tl.load(end_ptr + segment, mask=segment < segments, other=0) - first
    mine = (segment < segments) & (length >= SHORTEST) & (length <= longest)
    length = tl.where(mine, length, 0)

    sums = tl.zeros((BLOCK, BLOCK_COLUMNS), tl.float32)
    for start in range(0, tl.max(length), UNROLL):
        for step in tl.static_range(UNROLL):
            live = start + step < length
            row = first + start + step
            if HAS_ORDER:
                row = tl.load(order_ptr + row, mask=live, other=0)
            sums += tl.load(values_ptr + row * COLUMNS + column, mask=live & column_live, other=0.0).to(tl.float32)
    out = sums_ptr + segment * COLUMNS + column
    if ADD:
        sums = tl.load(out, mask=mine & column_live, other=0.0) + sums
    tl.store(out, sums, mask=mine & column_live)


def segment_reduce(values_ND: Tensor, order_M: Tensor, starts: Tensor, total_UD: Tensor | None) -> Tensor:
    """`reference.segment_reduce`, bit for bit."""
    values_ND, order_M, starts = values_ND.contiguous(), order_M.contiguous(), starts.contiguous()
    segments, columns, add = len(starts) - 1, values_ND.shape[1], total_UD is not None
    sums_UD = values_ND.new_empty(segments, columns, dtype=torch.float32) if total_UD is None else total_UD
    if sums_UD.numel() == 0:
        return sums_UD
    # Adding zeros would keep the values of empty segments as well, at the price of reading and writing them.
    _launch(values_ND, order_M, starts[:-1], starts[1:], sums_UD, 1 if add else 0, CHUNK, add)
    # A segment of more than CHUNK rows has less than twice as many chunks as its length over CHUNK.
    limit = 2 * len(order_M) // CHUNK
    if len(order_M) > CHUNK:
        first, end, chunk_starts = _chunks(starts, limit)
        chunks = values_ND.new_empty(limit, columns, dtype=torch.float32)
        _launch(values_ND, order_M, first, end, chunks, 1, CHUNK, False)
        _launch(chunks, None, chunk_starts[:-1], chunk_starts[1:], sums_UD, 1, limit, add)
    return sums_UD


def _chunks(starts: Tensor, limit: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where the chunks of long segments begin and end, [limit] each, and which are each segment's, [U + 1]. Nothing of
    it waits for the device, so the limit stands in for their number; those beyond it are empty."""
    lengths = starts.diff()
    counts = torch.where(lengths > CHUNK, (lengths + CHUNK - 1) // CHUNK, 0)
    chunk_starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    chunk = torch.arange(limit, device=starts.device)
    owner = (torch.searchsorted(chunk_starts, chunk, right=True) - 1).clamp_max(len(lengths) - 1)
    first = starts[owner] + CHUNK * (chunk - chunk_starts[owner])
    end = torch.minimum(first + CHUNK, starts[owner + 1])
    return first, torch.where(chunk < chunk_starts[-1], end, first), chunk_starts


def _launch(
    values: Tensor,
    order: Tensor | None,
    first: Tensor,
    end: Tensor,
    sums: Tensor,
    shortest: int,
    longest: int,
    add: bool,
) -> None:
    segments, columns = sums.shape
    block_columns = min(triton.next_power_of_2(columns), BLOCK_COLUMNS)
    block = 128 if interpreted() else BLOCK_COLUMNS // block_columns
    _running_sums[(triton.cdiv(segments, block) * triton.cdiv(columns, block_columns),)](
        values,
        first if order is None else order,
        first,
        end,
        sums,
        segments,
        longest,
        COLUMNS=columns,
        SHORTEST=shortest,
        HAS_ORDER=order is not None,
        ADD=add,
        BLOCK=block,
        BLOCK_COLUMNS=block_columns,
        UNROLL=UNROLL,
        num_warps=1,
    )
