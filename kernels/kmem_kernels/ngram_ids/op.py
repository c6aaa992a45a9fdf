"""Row ids of hashed n-grams: the kernel on CUDA and under Triton's interpreter, the reference elsewhere."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from ..backend import Backend, chosen
from . import reference


def ngram_ids(
    history: Tensor,
    documents: Tensor | None,
    orders: Sequence[int],
    multipliers: Sequence[int],
    sizes: Sequence[int],
    offsets: Sequence[int],
    boundary: Literal["none", "document", "eos"],
    pad_id: int,
    backend: Backend | None = None,
) -> Tensor:
    """Rows int64 [B, T, orders * heads]; all -1 for a token whose own id is below 0.

    Args:
        history: int64 [B, N-1+T] token ids, N the largest order; the first N-1 are look-back only. Below 0: missing.
        documents: int64 [B, N-1+T], for the boundary `document`; None makes each row one document.
        orders: ascending lengths of n-grams; multipliers: N odd numbers, entry i for the id i tokens back.
        sizes, offsets: rows and first row of each head, orders outermost.
        boundary: where look-back ends: `none`, `document` (another document or a missing token) or `eos` (`pad_id`).
        pad_id: the id in place of context that is missing or out of bounds.
        backend: default `triton` for CUDA tensors, else `torch`.
    """
    if chosen(backend, history) == "torch":
        return reference.ngram_ids(history, documents, orders, multipliers, sizes, offsets, boundary, pad_id)
    from .triton import ngram_ids as kernel  # a CPU run never compiles

    return kernel(history, documents, tuple(orders), tuple(multipliers), tuple(sizes), tuple(offsets), boundary, pad_id)
