"""The definition of the kernel, addition by addition, in torch."""

import torch
from torch import Tensor

# Shape letters: N rows of D values, M of them in segments, U segments.

CHUNK = 256
"""Rows per running sum. A longer segment is cut into chunks, and its sum is the running sum of the chunks' sums.
Different programs compute the chunks: with Zipf-distributed ids, a single program would take much longer for the most
frequent id than all others."""


def segment_reduce(values_ND: Tensor, order_M: Tensor, starts: Tensor, total_UD: Tensor | None) -> Tensor:
    """See `op.segment_reduce`."""
    lengths = starts.diff()
    owners = torch.arange(len(lengths), device=starts.device).repeat_interleave((lengths + CHUNK - 1) // CHUNK)
    chunk_starts = torch.searchsorted(owners, torch.arange(len(starts), device=starts.device))
    first = starts[owners] + CHUNK * (torch.arange(len(owners), device=starts.device) - chunk_starts[owners])
    chunks = _running_sums(values_ND, order_M, first, torch.minimum(first + CHUNK, starts[owners + 1]))
    places = torch.arange(len(chunks), device=starts.device)
    sums = _running_sums(chunks, places, chunk_starts[:-1], chunk_starts[1:])
    return sums if total_UD is None else total_UD.add_(sums)


def _running_sums(values: Tensor, order: Tensor, first: Tensor, end: Tensor) -> Tensor:
    sums = torch.zeros(len(first), values.shape[1], dtype=torch.float32, device=values.device)
    for step in range(int((end - first).max()) if len(first) else 0):
        live = first + step < end
        sums[live] += values[order[(first + step)[live]]].float()
    return sums
