"""Sums rows that share an id: the gradient of a table row that was looked up several times.

The segment alone fixes the order of additions (see reference.py). So results are equal bit for bit between runs,
backends and devices, whatever else is summed in the same call. There are no atomics, and nothing waits for the device.
"""

import torch
from torch import Tensor

from ..backend import Backend, chosen
from . import reference

# Shape letters: N rows of D values, M of them in segments, U segments.


def segment_reduce(
    values_ND: Tensor,
    order_M: Tensor,
    starts: Tensor,
    total_UD: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """fp32 [U, D]: row u is the sum of values[order[starts[u]:starts[u + 1]]], in fp32 and in this order.

    Works outside autograd: backward passes and updates use it. Rows that do not occur in `order` are never read.

    Args:
        values_ND: fp32, bf16 or fp16.
        order_M: int64, indices into the values.
        starts: int64 [U + 1], ascending from 0 to M. `segments_of` makes `order` and `starts` from ids.
        total_UD: fp32, contiguous; the sums are added to it in place. Rows of empty segments are not written.
        backend: default `triton` for CUDA tensors, else `torch`.

    Raises:
        ValueError: the values have another dtype, or the total does not fit.
    """
    if values_ND.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"sums are in fp32, but the values are {values_ND.dtype}; give fp32, bf16 or fp16")
    shape = (len(starts) - 1, values_ND.shape[1])
    if total_UD is not None and (
        total_UD.shape != shape or total_UD.dtype != torch.float32 or not total_UD.is_contiguous()
    ):
        raise ValueError(f"the total must be contiguous fp32 {shape}, not {total_UD.dtype} {tuple(total_UD.shape)}")
    with torch.no_grad():
        if chosen(backend, values_ND) == "torch":
            return reference.segment_reduce(values_ND, order_M, starts, total_UD)
        from .triton import segment_reduce as kernel  # a CPU run never compiles

        return kernel(values_ND, order_M, starts, total_UD)


def segments_of(ids_M: Tensor, num_segments: int) -> tuple[Tensor, Tensor]:
    """(order [M], starts [num_segments + 1]), both int64, for int64 ids that are at least 0 and below `num_segments`.
    Segment u holds the entries with id u, in their original order. Does not wait for the device."""
    ids, order = ids_M.sort(stable=True)
    return order, torch.searchsorted(ids, torch.arange(num_segments + 1, device=ids_M.device))
