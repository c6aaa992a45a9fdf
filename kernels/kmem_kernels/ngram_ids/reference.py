"""The definition of the kernel, token by token, in plain Python integers over torch tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor

# Shape letters: B sequences, T tokens.


def ngram_ids(
    history: Tensor,
    documents: Tensor | None,
    orders: Sequence[int],
    multipliers: Sequence[int],
    sizes: Sequence[int],
    offsets: Sequence[int],
    boundary: str,
    pad_id: int,
) -> Tensor:
    """Row ids int64 [B, T, orders * heads] of the n-grams that end at each of the last T tokens; see
    `op.ngram_ids`."""
    context = len(multipliers) - 1
    heads = len(sizes) // len(orders)
    batch, width = history.shape
    rows = torch.full((batch, width - context, len(sizes)), -1, dtype=torch.int64)
    ids = history.tolist()
    homes = torch.zeros_like(history).tolist() if documents is None else documents.tolist()
    for sequence in range(batch):
        for position in range(context, width):
            current = ids[sequence][position]
            if current < 0:
                continue
            mix, outside = current * multipliers[0], False
            for back in range(1, context + 1):
                past = ids[sequence][position - back]
                if boundary == "document":
                    outside |= past < 0 or homes[sequence][position - back] != homes[sequence][position]
                elif boundary == "eos":
                    outside |= past < 0 or past == pad_id
                mix ^= (pad_id if outside or past < 0 else past) * multipliers[back]
                if back + 1 in orders:
                    first = orders.index(back + 1) * heads
                    for head in range(first, first + heads):
                        rows[sequence, position - context, head] = mix % sizes[head] + offsets[head]
    return rows.to(history.device)
