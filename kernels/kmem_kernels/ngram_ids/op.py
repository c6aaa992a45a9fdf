"""Row ids of hashed n-grams: the kernel on CUDA and under Triton's interpreter, the reference elsewhere."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from ..backend import Backend, chosen
from . import reference

# Shape letters: B sequences, T tokens, N largest n-gram order.


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
    """Row ids int64 [B, T, orders * heads]; all -1 for a missing token.

    Args:
        history: int64 [B, N-1+T], token ids; the first N-1 are look-back only. An id below 0 is a missing token.
        documents: int64 [B, N-1+T], document ids for the boundary `document`; None: each sequence is one document.
        orders: lengths of the n-grams, ascending.
        multipliers: N odd numbers; entry i multiplies the id i tokens back.
        sizes, offsets: number of rows and first row of each head, orders outermost.
        boundary: where look-back ends: `none`, `document` (at another document or a missing token) or `eos` (at
            `pad_id`).
        pad_id: id used for context that is missing or out of bounds.
        backend: default `triton` for CUDA tensors, else `torch`.
    """
    if chosen(backend, history) == "torch":
        return reference.ngram_ids(history, documents, orders, multipliers, sizes, offsets, boundary, pad_id)
    from .triton import ngram_ids as kernel  # a CPU run never compiles

    return kernel(history, documents, tuple(orders), tuple(multipliers), tuple(sizes), tuple(offsets), boundary, pad_id)
