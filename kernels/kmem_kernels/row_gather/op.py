"""Gathers rows of a table in device memory, or in host memory that the device reads in place.

With unified addressing, a kernel reads pinned host memory at its host address. That holds for memory from
`pin_memory()`, and for any allocation after `cudaHostRegister`, whose default flags map it. So rows cross the bus once,
without a copy on the host.
"""

import torch
from torch import Tensor

from ..backend import Backend, chosen
from . import reference

# Shape letters: R rows of D values in the table, U of them gathered into an output of N rows.


def row_gather(
    table_RD: Tensor,
    rows_U: Tensor,
    out_ND: Tensor | None = None,
    places_U: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Gather the rows `rows_U` of the table as fp32 [U, D], or write them into `out_ND` and return it.

    Works outside autograd. Does not wait for the device: the table must not change until the gather is done.

    Args:
        table_RD: fp32 or bf16, contiguous; on the device of the ids, or in pinned host memory.
        rows_U: int64, from 0 to R - 1, in any order; repetitions are allowed.
        out_ND: fp32, contiguous; without `places_U`, N must be U.
        places_U: int64, no two equal: the output row of each gathered row. Other rows of the output do not change.
        backend: default `triton` for ids on CUDA, else `torch`.

    Raises:
        ValueError: dtypes or shapes do not fit, or a device cannot read the host memory.
    """
    if table_RD.dtype not in (torch.float32, torch.bfloat16) or not table_RD.is_contiguous():
        raise ValueError(f"a table must be contiguous fp32 or bf16, not {table_RD.dtype} {table_RD.stride()}")
    if out_ND is None:
        if places_U is not None:
            raise ValueError("places refer to rows of an output, but no output is given")
        out_ND = torch.empty(len(rows_U), table_RD.shape[1], device=rows_U.device)
    fits = out_ND.shape[1] == table_RD.shape[1] and (places_U is not None or len(out_ND) == len(rows_U))
    if not fits or out_ND.dtype != torch.float32 or not out_ND.is_contiguous():
        raise ValueError(f"{len(rows_U)} rows of {table_RD.shape[1]} values do not fit into {tuple(out_ND.shape)}")
    if places_U is not None and len(places_U) != len(rows_U):
        raise ValueError(f"{len(places_U)} places for {len(rows_U)} rows")
    with torch.no_grad():
        if chosen(backend, rows_U) == "torch":
            return reference.row_gather(table_RD, rows_U, out_ND, places_U)
        if rows_U.is_cuda and not (table_RD.is_cuda or table_RD.is_pinned()):
            raise ValueError("a device can read only pinned host memory, and this table is not pinned")
        from .triton import row_gather as kernel  # a CPU run never compiles

        return kernel(table_RD, rows_U, out_ND, places_U)
