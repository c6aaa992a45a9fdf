"""What the fetched blocks of a memory bank compute in a layer.

Tokens are sorted by block, and every level is a grouped product: [tokens of a block, width] x [width, r]. Equal blocks
are one group, however their tokens are spread over sequences, and their gradients arrive summed. The grouping is that
of all layers; it is made once for a batch of tokens.

With x the sublayer's normed input, l the levels that a token has blocks of, W the projection that a block updates and q
the attention's queries, normed but not rotated:

    ffn      FFN(x) + sum_l down_l^T (silu(gate_l x) * (up_l x))     as one FFN with all levels' units beside its own
    lora_*   W x + sum_l alpha / r_l  b_l^T (a_l x)
    kv       heads(q) + sum_l softmax(q keys_l^T / sqrt(e)) values_l   before the output projection

For kv every head has keys and values of its own, there is no causal mask and no position, and every level has a softmax
of its own, so that a level adds the same whatever the others do.
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

# Shape letters: B sequences, T tokens, N tokens in an order, U blocks of a level, r rank, D width, h heads,
# e head width.

ALIGNMENT = 8
"""Units of a block are padded up to a multiple of this: grouped_mm needs rows of a multiple of 16 bytes."""


class TokenGroups(NamedTuple):
    """Tokens in the order of their blocks, which is the same for some levels: usually for all."""

    tokens: Tensor | None
    """int64 [N], tokens b * T + t; None: all of them, in their own order."""
    counts: dict[int, Tensor]
    """Level -> int64 [U], how many tokens in this order belong to each block; they add up to N."""

    def to(self, device: torch.device | str) -> "TokenGroups":
        tokens = None if self.tokens is None else self.tokens.to(device)
        return TokenGroups(tokens, {level: counts.to(device) for level, counts in self.counts.items()})


def group_tokens(index: Mapping[int, Tensor], blocks: Mapping[int, int], tokens: int) -> tuple[TokenGroups, ...]:
    """Sort the tokens of a batch by their blocks. On the host: on a device it waits for results.

    Args:
        index: level -> which of the level's blocks each sequence [B] or each token [B, T] uses, int64, MISSING for
            none; all levels alike.
        blocks: level -> U.
        tokens: T.
    """
    flat = {level: values.flatten() for level, values in sorted(index.items()) if bool((values >= 0).any())}
    if not flat:
        return ()
    repeats = tokens if next(iter(index.values())).dim() == 1 else 1
    # Blocks of a level in the order of their clusters make one order of paths right for every level.
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
        else:  # such as a path with a gap: an order of its own
            own = values.argsort(stable=True)
            groups.append(TokenGroups(_tokens(own[values[own] >= 0], len(paths), repeats), {level: counts}))
    return tuple(groups)


def _tokens(order: Tensor, units: int, repeats: int) -> Tensor | None:
    """The tokens of sequences (or tokens) in this order, `repeats` of each; None for all of them as they are."""
    if len(order) == units and bool((order.diff() > 0).all()):
        return None
    return (order[:, None] * repeats + torch.arange(repeats, device=order.device)).flatten()


Product = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(rows [N, ..] in order of their blocks, blocks [U, values], counts [U]) -> [N, ..]."""


@dataclass(frozen=True)
class BankInput:
    """What a layer's bank holds for a batch of tokens. Without groups: nothing, the model as it is without memory.

    `widen` and `adapt` return `out` itself where the bank's kind is another.
    """

    layout: BankLayout
    groups: tuple[TokenGroups, ...] = ()
    blocks: Mapping[int, Tensor] = field(default_factory=dict)
    """Level -> [U, values of a block] of this layer, in any floating type; gradients flow to them."""

    def widen(self, x: Tensor, out: Tensor) -> Tensor:
        """The feed-forward's output [B, T, d], for its normed input x [B, T, d], with what the blocks add."""
        return self._added(x, out, _swiglu) if self.layout.kind == "ffn" else out

    def adapt(self, projection: str, x: Tensor, out: Tensor) -> Tensor:
        """The output [B, T, D'] of a projection of x [B, T, D], with its low-rank updates."""
        if projection not in ADAPTED.get(self.layout.kind, ()):
            return out

        def product(rows: Tensor, blocks: Tensor, counts: Tensor) -> Tensor:
            parts = self.layout.by_part(blocks)
            read, written = (parts[f"{projection}.{half}"].to(rows.dtype) for half in "ab")
            units = grouped_linear(rows, _aligned(read), counts) * (self.layout.alpha / read.shape[1])
            return grouped_linear(units, _aligned(written).transpose(1, 2), counts)

        return self._added(x, out, product)

    def attend(self, query: Tensor) -> Tensor | None:
        """What queries [B, T, h, e], normed and not rotated, find in the blocks: [B, T, h * e'], which is added to the
        heads' output; None where blocks are no keys and values."""
        if self.layout.kind != "kv":
            return None

        def product(rows: Tensor, blocks: Tensor, counts: Tensor) -> Tensor:
            parts = self.layout.by_part(blocks.to(rows.dtype))
            heads = rows.shape[1]
            keys, values = (parts[name].unflatten(2, (heads, -1)) for name in ("keys", "values"))
            step = max(1, MOST_GROUPS // len(counts))  # so that a product need not be cut
            ranges = [slice(start, start + step) for start in range(0, heads, step)]
            found = [_attention(rows[:, some], keys[:, :, some], values[:, :, some], counts) for some in ranges]
            return torch.cat(found, dim=1).flatten(1)

        nothing = query.new_zeros(*query.shape[:2], self.layout.parts[1].width)
        return self._added(query, nothing, product)

    def _added(self, x: Tensor, out: Tensor, product: Product) -> Tensor:
        """out [B, T, ..] with the sum over levels of `product` of x [B, T, ..]."""
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
    # One product for gate and up, which stand together.
    gate_up = _aligned(gate_up.unflatten(1, (2, units, width))).flatten(1, 2)
    down = _aligned(down.unflatten(1, (units, width))).transpose(1, 2)
    return grouped_linear(swiglu(grouped_linear(rows, gate_up, counts)), down, counts)


def _attention(query: Tensor, keys: Tensor, values: Tensor, counts: Tensor) -> Tensor:
    """query [N, h, e], keys [U, r, h, e], values [U, r, h, e'] -> [N, h, e'].

    Every head of a block is a group of the products.
    """
    tokens, heads, width = query.shape
    rank = keys.shape[1]
    keys, values = (_aligned(part.transpose(1, 2).flatten(0, 1)) for part in (keys, values))  # [U * h, r, e]
    # Token n of block u stands, for head j, after the blocks before u, and in u after the heads before j.
    before = (counts.cumsum(0) - counts).repeat_interleave(counts, output_size=tokens)
    size = counts.repeat_interleave(counts, output_size=tokens)
    number, head = (torch.arange(count, device=query.device) for count in (tokens, heads))
    place = ((before * heads + number - before)[:, None] + head * size[:, None]).flatten()
    rows = query.flatten(0, 1)
    rows = torch.zeros_like(rows).index_copy(0, place, rows)
    of_heads = counts.repeat_interleave(heads, output_size=heads * len(counts))
    scores = grouped_linear(rows, keys, of_heads)[:, :rank] * width**-0.5
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(scores.dtype)
    found = grouped_linear(F.pad(weights, (0, keys.shape[1] - rank)), values.transpose(1, 2), of_heads)
    return found.index_select(0, place).view(tokens, heads, -1)


def _aligned(part: Tensor) -> Tensor:
    """[.., r, D] with units of zeros up to a multiple of ALIGNMENT."""
    missing = -part.shape[-2] % ALIGNMENT
    return F.pad(part, (0, 0, 0, missing)) if missing else part
