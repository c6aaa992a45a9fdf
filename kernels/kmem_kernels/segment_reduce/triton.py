"""One kernel, launched up to three times: for short segments, for the chunks of long segments, and for the sums of
these chunks."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import interpreted
from .reference import CHUNK

# Shape letters: N rows of D values, M of them in segments, U segments.

BLOCK_COLUMNS = 256
"""Columns per program. A program is a single warp, and a thread holds 8 columns. Most segments have one or two rows,
and separate warps do not wait for longer segments."""
UNROLL = 4
"""Number of rows requested before the first one is added; the order of additions does not change."""


@triton.jit
def _running_sums(
    values_ptr,  # [N, D]
    order_ptr,  # int64 [M], read if HAS_ORDER
    first_ptr,  # int64 [U]
    end_ptr,  # int64 [U]
    sums_ptr,  # fp32 [U, D]; rows of segments shorter than SHORTEST or longer than `longest` do not change
    segments,
    longest,  # not a constexpr: it depends on M, and every new value would compile again
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
    # Adding zeros to the totals of empty segments would be correct as well, but would read and write them.
    _launch(values_ND, order_M, starts[:-1], starts[1:], sums_UD, 1 if add else 0, CHUNK, add)
    # A segment of more than CHUNK rows has fewer than 2 * length / CHUNK chunks.
    limit = 2 * len(order_M) // CHUNK
    if len(order_M) > CHUNK:
        first, end, chunk_starts = _chunks(starts, limit)
        chunks = values_ND.new_empty(limit, columns, dtype=torch.float32)
        _launch(values_ND, order_M, first, end, chunks, 1, CHUNK, False)
        _launch(chunks, None, chunk_starts[:-1], chunk_starts[1:], sums_UD, 1, limit, add)
    return sums_UD


def _chunks(starts: Tensor, limit: int) -> tuple[Tensor, Tensor, Tensor]:
    """First rows and ends of the chunks of long segments, [limit] each, and the first chunk of each segment, [U + 1].
    To avoid waiting for the device, `limit` chunks are made; the ones that no segment needs are empty."""
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
