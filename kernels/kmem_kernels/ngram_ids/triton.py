"""One program per block of tokens. It reads every id once per look-back position and writes every row id once."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

# Shape letters: B sequences, T tokens, N largest n-gram order.

BLOCK_TOKENS = 128
"""Tokens per program. The time is bound by writing row ids of 8 bytes."""
BOUNDARIES = {"none": 0, "document": 1, "eos": 2}


@triton.jit
def _ngram_ids(
    history_ptr,  # int64 [B, N-1+T]
    documents_ptr,  # int64 [B, N-1+T], read if HAS_DOCUMENTS
    constants_ptr,  # int64: N multipliers, then the heads' sizes, then their offsets
    order_ptr,  # int32 [N-1]: index of the order back + 1, or -1
    rows_ptr,  # int64 [B, T, total heads]
    tokens,
    pad_id,
    CONTEXT: tl.constexpr,
    HEADS: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    TOTAL_HEADS: tl.constexpr,
    BOUNDARY: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(tokens, BLOCK)  # one grid axis: the other axes are limited to 65,535 programs
    sequence = (tl.program_id(0) // blocks).to(tl.int64)
    token = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    live = token < tokens
    base = sequence * (tokens + CONTEXT)
    here = history_ptr + base + CONTEXT + token
    home = documents_ptr + base + CONTEXT + token
    head = tl.arange(0, HEADS_BLOCK)
    head_live = head < HEADS
    out = rows_ptr + (sequence * tokens + token.to(tl.int64)) * TOTAL_HEADS
    sizes_ptr = constants_ptr + CONTEXT + 1
    offsets_ptr = sizes_ptr + TOTAL_HEADS

    current = tl.load(here, mask=live, other=-1)
    missing = current < 0
    if HAS_DOCUMENTS:
        document = tl.load(home, mask=live, other=0)
    mix = tl.where(missing, 0, current) * tl.load(constants_ptr)
    within = live
    for back in tl.static_range(1, CONTEXT + 1):
        past = tl.load(here - back, mask=live, other=-1)
        present = past >= 0
        if BOUNDARY == 2:
            present = present & (past != pad_id)
        if HAS_DOCUMENTS:
            present = present & (tl.load(home - back, mask=live, other=0) == document)
        if BOUNDARY != 0:
            within = within & present
            present = within
        mix = mix ^ (tl.where(present, past, pad_id) * tl.load(constants_ptr + back))
        order = tl.load(order_ptr + back - 1)
        if order >= 0:
            size = tl.load(sizes_ptr + order * HEADS + head, mask=head_live, other=1)
            offset = tl.load(offsets_ptr + order * HEADS + head, mask=head_live, other=0)
            rows = mix[:, None] % size[None, :] + offset[None, :]
            rows = tl.where(missing[:, None], -1, rows)
            tl.store(out[:, None] + order * HEADS + head[None, :], rows, mask=live[:, None] & head_live[None, :])


def ngram_ids(
    history: Tensor,
    documents: Tensor | None,
    orders: tuple[int, ...],
    multipliers: tuple[int, ...],
    sizes: tuple[int, ...],
    offsets: tuple[int, ...],
    boundary: str,
    pad_id: int,
) -> Tensor:
    """`reference.ngram_ids`, bit for bit."""
    context = len(multipliers) - 1
    heads = len(sizes) // len(orders)
    history = history.contiguous()
    documents = None if documents is None or boundary != "document" else documents.contiguous()
    batch, tokens = len(history), history.shape[1] - context
    rows = history.new_empty(batch, tokens, len(sizes))
    if rows.numel() == 0:
        return rows
    constants, order_of_back = _constants(orders, multipliers, sizes, offsets, history.device)
    _ngram_ids[(triton.cdiv(tokens, BLOCK_TOKENS) * batch,)](
        history,
        history if documents is None else documents,
        constants,
        order_of_back,
        rows,
        tokens,
        pad_id,
        CONTEXT=context,
        HEADS=heads,
        HEADS_BLOCK=triton.next_power_of_2(heads),
        TOTAL_HEADS=len(sizes),
        BOUNDARY=BOUNDARIES[boundary],
        HAS_DOCUMENTS=documents is not None,
        BLOCK=BLOCK_TOKENS,
    )
    return rows


@functools.lru_cache(maxsize=256)  # a copy to the device synchronises; a model has only a few tables
def _constants(
    orders: tuple[int, ...],
    multipliers: tuple[int, ...],
    sizes: tuple[int, ...],
    offsets: tuple[int, ...],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    order_of_back = [orders.index(length) if length in orders else -1 for length in range(2, len(multipliers) + 1)]
    return (
        torch.tensor([*multipliers, *sizes, *offsets], dtype=torch.int64, device=device),
        torch.tensor(order_of_back, dtype=torch.int32, device=device),
    )
