"""The computation of fetched bank blocks in a layer.

Tokens are sorted by block, and every level is a grouped product: [tokens of a block, width] x [width, r]. All tokens
that use the same block are one group, whichever sequences they are in, and the gradient of the block is the sum over
the group. All layers use the same groups, which are made once per batch of tokens.

x is the normed input of the sublayer, l runs over the levels on which the token has a block, W is the projection that a
block updates, and q are the attention's queries, normed but not rotated:

    ffn      FFN(x) + sum_l down_l^T (silu(gate_l x) * (up_l x))     as one FFN with all levels' units beside its own
    lora_*   W x + sum_l alpha / r_l  b_l^T (a_l x)
    kv       heads(q) + sum_l softmax(q keys_l^T / sqrt(e)) values_l   before the output projection

For kv, every head has its own keys and values, and there is no causal mask and no position. Every level has its own
softmax, so its contribution does not depend on the other levels.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .bank_layout import ADAPTED, BankLayout
from .matmul import MOST_GROUPS, grouped_linear
from .swiglu import swiglu

# Shape letters: B sequences, T tokens, N tokens sorted by block, U blocks of a level, r rank, D width, h heads,
# e head width.

ALIGNMENT = 8
"""The rank of a block is padded up to a multiple of this: grouped_mm needs rows of a multiple of 16 bytes."""


class TokenGroups(NamedTuple):
    """Tokens sorted by block. Several levels can share one order; usually all levels do."""

    tokens: Tensor | None
    """int64 [N], token numbers b * T + t; None: all tokens, in the order of the batch."""
    counts: dict[int, Tensor]
    """Level -> int64 [U], number of consecutive tokens of each block; the counts of a level add up to N."""

    def to(self, device: torch.device | str) -> "TokenGroups":
        tokens = None if self.tokens is None else self.tokens.to(device)
        return TokenGroups(tokens, {level: counts.to(device) for level, counts in self.counts.items()})


def group_tokens(index: Mapping[int, Tensor], blocks: Mapping[int, int], tokens: int) -> tuple[TokenGroups, ...]:
    """Sort the tokens of a batch by block. Call it with host tensors: on a device it would synchronise.

    Args:
        index: level -> int64, the number of the block that each sequence [B] or each token [B, T] uses; MISSING for
            none. All levels have the same shape.
        blocks: level -> U.
        tokens: T.
    """
    flat = {level: values.flatten() for level, values in sorted(index.items()) if bool((values >= 0).any())}
    if not flat:
        return ()
    repeats = tokens if next(iter(index.values())).dim() == 1 else 1
    # Blocks of a level are numbered in the order of their clusters, so one order of the paths sorts every level.
    paths = torch.zeros_like(next(iter(flat.values())))
    for level, values in flat.items():
        _, paths = torch.unique(paths * (blocks[level] + 1) + values + 1, return_inverse=True)
    first = next(iter(flat.values())) >= 0
    shared = paths.argsort(stable=True)
    shared = shared[first[shared]]
    groups = [TokenGroups(_tokens(shared, len(paths), repeats), {})]
    for level, values in flat.items():
        counts = torch.bincount(values[values >= 0], minlength=blocks[level]) * repeats
        if torch.equal(values >= 0, first) and bool((values[shared].diff() >= 0).all()):
            groups[0].counts[level] = counts
        else:  # the level needs its own order, for example where a path has a gap
            order = values.argsort(stable=True)
            groups.append(TokenGroups(_tokens(order[values[order] >= 0], len(paths), repeats), {level: counts}))
    return tuple(groups)


def _tokens(order: Tensor, units: int, repeats: int) -> Tensor | None:
    """Token numbers of the sequences (or tokens) in `order`, `repeats` tokens of each; None if the order changes
    nothing."""
    if len(order) == units and bool((order.diff() > 0).all()):
        return None
    return (order[:, None] * repeats + torch.arange(repeats, device=order.device)).flatten()


Product = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(rows [N, ..] sorted by block, blocks [U, values], counts [U]) -> [N, ..]."""


@dataclass(frozen=True)
class BankInput:
    """The blocks that a layer reads for a batch of tokens. Without groups, the layer computes as without a bank.

    `widen` and `adapt` return `out` unchanged if the bank has another kind.
    """

    layout: BankLayout
    groups: tuple[TokenGroups, ...] = ()
    blocks: Mapping[int, Tensor] = field(default_factory=dict)
    """Level -> this layer's blocks [U, values of a block], in any floating type; gradients flow to them."""

    def widen(self, x: Tensor, out: Tensor) -> Tensor:
        """Add the blocks' contribution to the feed-forward's output [B, T, d]; x [B, T, d] is its normed input."""
        return self._added(x, out, _swiglu) if self.layout.kind == "ffn" else out

    def adapt(self, projection: str, x: Tensor, out: Tensor) -> Tensor:
        """Add the low-rank updates to the output [B, T, D'] of a projection of x [B, T, D]."""
        if projection not in ADAPTED.get(self.layout.kind, ()):
            return out

        def product(rows: Tensor, blocks: Tensor, counts: Tensor) -> Tensor:
            parts = self.layout.by_part(blocks)
            read, written = (parts[f"{projection}.{half}"].to(rows.dtype) for half in "ab")
            units = grouped_linear(rows, _aligned(read), counts) * (self.layout.alpha / read.shape[1])
            return grouped_linear(units, _aligned(written).transpose(1, 2), counts)

        return self._added(x, out, product)

    def attend(self, query: Tensor) -> Tensor | None:
        """Attention of queries [B, T, h, e], normed and not rotated, over the blocks' keys and values: [B, T, h * e'],
        to be added to the heads' output. None for other kinds of bank."""
        if self.layout.kind != "kv":
            return None

        def product(rows: Tensor, blocks: Tensor, counts: Tensor) -> Tensor:
            parts = self.layout.by_part(blocks.to(rows.dtype))
            heads = rows.shape[1]
            keys, values = (parts[name].unflatten(2, (heads, -1)) for name in ("keys", "values"))
            step = max(1, MOST_GROUPS // len(counts))  # as many heads as one grouped product can take
            head_ranges = [slice(start, start + step) for start in range(0, heads, step)]
            outs = [_attention(rows[:, part], keys[:, :, part], values[:, :, part], counts) for part in head_ranges]
            return torch.cat(outs, dim=1).flatten(1)

        nothing = query.new_zeros(*query.shape[:2], self.layout.parts[1].width)
        return self._added(query, nothing, product)

    def _added(self, x: Tensor, out: Tensor, product: Product) -> Tensor:
        """out [B, T, ..] plus, for every level, `product` of x [B, T, ..]."""
        flat, total = x.flatten(0, 1), out.flatten(0, 1)
        for tokens, counts in self.groups:
            rows = flat if tokens is None else flat.index_select(0, tokens)
            updates = [product(rows, self.blocks[level], number) for level, number in counts.items()]
            update = sum(updates[1:], start=updates[0])
            total = total + update if tokens is None else total.index_add(0, tokens, update)
        return total.view_as(out)


def _swiglu(rows: Tensor, blocks: Tensor, counts: Tensor) -> Tensor:
    """rows [N, D], blocks [U, 3 r D] -> [N, D]."""
    width = rows.shape[1]
    units = blocks.shape[1] // (3 * width)
    gate_up, down = blocks.to(rows.dtype).split((2 * units * width, units * width), dim=1)
    # One product for gate and up, which are stored side by side.
    gate_up = _aligned(gate_up.unflatten(1, (2, units, width))).flatten(1, 2)
    down = _aligned(down.unflatten(1, (units, width))).transpose(1, 2)
    return grouped_linear(swiglu(grouped_linear(rows, gate_up, counts)), down, counts)


def _attention(query: Tensor, keys: Tensor, values: Tensor, counts: Tensor) -> Tensor:
    """query [N, h, e], keys [U, r, h, e], values [U, r, h, e'] -> [N, h, e'].

    Every head of every block is one group of the grouped products.
    """
    tokens, heads, width = query.shape
    rank = keys.shape[1]
    keys, values = (_aligned(part.transpose(1, 2).flatten(0, 1)) for part in (keys, values))  # [U * h, r, e]
    # Row of (token n of block u, head j): after all rows of the blocks before u, and within u after the heads before j.
    before = (counts.cumsum(0) - counts).repeat_interleave(counts, output_size=tokens)
    size = counts.repeat_interleave(counts, output_size=tokens)
    number, head = (torch.arange(count, device=query.device) for count in (tokens, heads))
    place = ((before * heads + number - before)[:, None] + head * size[:, None]).flatten()
    rows = query.flatten(0, 1)
    rows = torch.zeros_like(rows).index_copy(0, place, rows)
    head_counts = counts.repeat_interleave(heads, output_size=heads * len(counts))
    scores = grouped_linear(rows, keys, head_counts)[:, :rank] * width**-0.5
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(scores.dtype)
    out = grouped_linear(F.pad(weights, (0, keys.shape[1] - rank)), values.transpose(1, 2), head_counts)
    return out.index_select(0, place).view(tokens, heads, -1)


def _aligned(part: Tensor) -> Tensor:
    """[.., r, D], with r padded with zeros up to a multiple of ALIGNMENT."""
    missing = -part.shape[-2] % ALIGNMENT
    return F.pad(part, (0, 0, 0, missing)) if missing else part
