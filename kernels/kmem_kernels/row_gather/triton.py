"""Threads share the pieces of all rows evenly; a piece has 16 bytes if the row size is a multiple of 16 bytes.

A tile of rows and a power of two of columns would leave lanes idle at other widths (half of them at 264 columns).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import interpreted

# Shape letters: R rows of D values in the table, U of them gathered into an output of N rows.

ACCESS_BYTES = 16
BLOCK_PIECES = 512
"""Pieces per program: each of 128 threads requests four pieces before the first one arrives."""


@triton.jit
def _row_gather(
    table_ptr,  # fp32 or bf16 [R, D]
    rows_ptr,  # int64 [U]
    places_ptr,  # int64 [U], read if HAS_PLACES
    out_ptr,  # fp32 [N, D]
    pieces,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_PLACES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    per_row: tl.constexpr = COLUMNS // WIDTH
    for block in range(tl.program_id(0), tl.cdiv(pieces, BLOCK), tl.num_programs(0)):
        piece = block * BLOCK + tl.arange(0, BLOCK)
        live = piece < pieces
        number = piece // per_row
        row = tl.load(rows_ptr + number, mask=live, other=0)
        place = number.to(tl.int64)
        if HAS_PLACES:
            place = tl.load(places_ptr + number, mask=live, other=0)
        column = ((piece % per_row) * WIDTH)[:, None] + tl.arange(0, WIDTH)[None, :]
        values = tl.load(table_ptr + row[:, None] * COLUMNS + column, mask=live[:, None])
        tl.store(out_ptr + place[:, None] * COLUMNS + column, values.to(tl.float32), mask=live[:, None])


def row_gather(table_RD: Tensor, rows_U: Tensor, out_ND: Tensor, places_U: Tensor | None) -> Tensor:
    """`reference.row_gather`, bit for bit."""
    columns = table_RD.shape[1]
    if columns == 0 or len(rows_U) == 0:
        return out_ND
    # The largest power of two that divides both.
    width = min(columns & -columns, ACCESS_BYTES // table_RD.element_size())
    pieces = len(rows_U) * (columns // width)
    block = 1 << 14 if interpreted() else BLOCK_PIECES
    programs = triton.cdiv(pieces, block)
    if rows_U.is_cuda and not table_RD.is_cuda:
        # Half of the multiprocessors already saturate the bus; the model's kernels can use the others.
        programs = min(programs, torch.cuda.get_device_properties(rows_U.device).multi_processor_count // 2)
    assert pieces + (programs + 1) * block < 2**31, f"{len(rows_U)} rows of {columns} values"
    _row_gather[(programs,)](
        table_RD,
        rows_U.contiguous(),
        rows_U if places_U is None else places_U.contiguous(),
        out_ND,
        pieces,
        COLUMNS=columns,
        WIDTH=width,
        HAS_PLACES=places_U is not None,
        BLOCK=block,
    )
    return out_ND
