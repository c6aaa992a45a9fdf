"""What the blocks of a memory bank hold, in which order, under which names and with which first values.

A tree has p levels of k children: level l, from 1, has k^l clusters, numbered so that the children of node n are
n * k .. n * k + k - 1. Leaves are clusters of level p, and a leaf's cluster of level l is leaf // k^(p-l). Each cluster
of a level owns one block in each of the bank's layers.

Rows. A table of level l has a row for every cluster, and one more, the last, for the generic blocks if the bank has
them. Row order of values: layer, part, unit of the rank r, value of the unit. So a row is [layers, parts.., r, width];
where all parts have the width d, as in the FFN, it is [layers, parts, r, d]. Matrices that produce hidden values are
stored transposed, one row per unit, so that every part has this form:

    kind        parts of a block, each [r, width], in this order                 width
    ffn         gate, up, down                                                   d
    lora_ffn    {gate_proj, up_proj, down_proj} x {a, b}                         d, f, d, f, f, d
    lora_qk     {q_proj, k_proj} x {a, b}                                        d, h e, d, g e
    lora_ov     {o_proj, v_proj} x {a, b}                                        h e, d, d, g e
    kv          keys, values                                                     h e, h e'

with d the hidden size, f the dense feed-forward's, h query heads, g key/value heads, e the width of a query head and e'
that of a value head.

Names. Checkpoints hold one tensor per layer and level, `layers.{i}.bank.level{l}` [rows, values of a block]: a stage of
a pipeline holds a range of columns of the whole rows, which are whole tensors under these names, and a rank of it an
interval of their rows. So they load on any mesh. Optimizer state of a row must be kept per layer, too: a number per row
of a stage would depend on which layers the stage has. Exports hold whole rows, `bank.level{l}` [rows, layers * values],
in row ranges `bank.level{l}.parts.{j}`: a context then reads one piece of a file per level.

First values. Blocks start as a no-op: what writes (down, b, values) is zero. The rest is drawn from a generator per
seed, layer, level, cluster and part, so that it does not depend on how tables are sharded.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .init import generator_of, truncated_normal
from .shape import Shape

MISSING = -1
"""In place of a leaf or a row: no block."""
GENERIC = -2
"""In place of a leaf among the addresses of a training batch: the generic blocks."""
ADAPTED = {
    "lora_ffn": ("gate_proj", "up_proj", "down_proj"),
    "lora_qk": ("q_proj", "k_proj"),
    "lora_ov": ("o_proj", "v_proj"),
}
"""Projections that have low-rank updates, by kind."""


def bank_table_name(level: int) -> str:
    """Name of the table of a level over all layers, [rows, layers * values of a block]; exports have its parts."""
    return f"bank.level{level}"


def bank_table_part_name(level: int, part: int) -> str:
    """Name of one of the row ranges in which an export holds the table of a level."""
    return f"{bank_table_name(level)}.parts.{part}"


def layer_bank_name(layer: int, level: int) -> str:
    """Name of the blocks of a level for one layer in a checkpoint, [rows, values of a block]."""
    return f"layers.{layer}.bank.level{level}"


class Part(NamedTuple):
    """A matrix [r, width] of a block."""

    name: str
    width: int
    start: str
    """First values. zero; normal: truncated, of the model's deviation; uniform: within 1 / sqrt(width), LoRA's."""


@dataclass(frozen=True)
class BankLayout:
    """The blocks of a model's bank, or of the layers of a stage."""

    kind: str
    children: int
    ranks: tuple[int, ...]
    """Of the blocks of every level, 0 for none."""
    layers: tuple[int, ...]
    """Layers that have blocks, ascending."""
    parts: tuple[Part, ...]
    """Of one block, in order."""
    alpha: float
    generic: bool
    """Whether tables have a row of generic blocks, the last."""
    init_std: float

    @classmethod
    def of(cls, shape: Shape) -> "BankLayout":
        """The layout of a model that has a bank."""
        bank = shape.bank
        return cls(
            bank.kind,
            bank.children,
            tuple(bank.levels),
            shape.bank_layers,
            _parts(shape),
            bank.alpha,
            bank.generic.probability > 0,
            shape.init_std,
        )

    def of_layers(self, layers: Sequence[int]) -> "BankLayout":
        """The layout of a table that holds those of these layers that have blocks."""
        return replace(self, layers=tuple(layer for layer in self.layers if layer in layers))

    def check_tree(self, record: Mapping[str, Any], where: str | Path) -> None:
        """Refuse a cluster tree whose leaves cannot address the bank: it has as many levels and children as the bank.

        Args:
            record: contents of its tree.json.
            where: its folder, for the message.

        Raises:
            ValueError: names the field of the model's section, both numbers and the remedy.
        """
        children, deep, levels = record["children"], record["levels"], len(self.ranks)
        if children != self.children:
            raise ValueError(
                f"model.bank.children: {self.children}, but the tree has {children} ({where}); take its number, "
                f"or a tree that kmem data cluster made with --children {self.children}"
            )
        if deep != levels:
            change = "write a rank of 0 for each level without blocks" if levels < deep else "drop the last ranks"
            raise ValueError(
                f"model.bank.levels: {levels}, but the tree has {deep} ({where}); {change}, or take a "
                f"tree that kmem data cluster made with --levels {levels}"
            )

    @property
    def levels(self) -> tuple[int, ...]:
        """Levels that have blocks, counted from 1."""
        return tuple(level for level, rank in enumerate(self.ranks, 1) if rank)

    def clusters(self, level: int) -> int:
        """Of a level of the tree."""
        return self.children**level

    def rows(self, level: int) -> int:
        """Of a level's table."""
        return self.clusters(level) + self.generic

    def subtree_rows(self, level: int, paths: Sequence[Sequence[int]]) -> list[range]:
        """Rows of a level's table that text of some subtrees uses, ascending: those of the clusters below them, of the
        clusters that they lie in, and the generic ones.

        Args:
            paths: of the subtrees, from the root down, as in (3, 7).
        """
        found = []
        for path in paths:
            number = 0
            for child in path[:level]:
                number = number * self.children + child
            below = self.children ** max(0, level - len(path))
            found.append(range(number * below, (number + 1) * below))
        if self.generic:
            found.append(range(self.generic_row(level), self.rows(level)))
        joined: list[range] = []
        for rows in sorted(found, key=lambda rows: rows.start):
            if joined and rows.start <= joined[-1].stop:
                joined[-1] = range(joined[-1].start, max(joined[-1].stop, rows.stop))
            else:
                joined.append(rows)
        return joined

    def generic_row(self, level: int) -> int:
        """The row of the generic blocks of a bank that has them."""
        assert self.generic, "this bank has no generic blocks"
        return self.clusters(level)

    def block_values(self, level: int) -> int:
        """Values of a cluster's block in one layer."""
        return self.ranks[level - 1] * sum(part.width for part in self.parts)

    def row_values(self, level: int) -> int:
        """Values of a cluster in all layers: a row."""
        return len(self.layers) * self.block_values(level)

    @property
    def fetched_values(self) -> int:
        """Values that a context fetches, a block of each level in each layer."""
        return sum(self.row_values(level) for level in self.levels)

    @property
    def bank_values(self) -> int:
        """Values of all clusters; generic blocks are `fetched_values` more."""
        return sum(self.clusters(level) * self.row_values(level) for level in self.levels)

    def by_layer(self, rows: Tensor, level: int) -> dict[int, Tensor]:
        """Rows [.., row values] of a level's table -> each layer's blocks [.., values], views of them."""
        return dict(zip(self.layers, rows.split(self.block_values(level), dim=-1), strict=True))

    def by_part(self, blocks: Tensor) -> dict[str, Tensor]:
        """Blocks [U, values] of one layer and level -> each part [U, r, width], views of them."""
        rank = blocks.shape[1] // sum(part.width for part in self.parts)
        pieces = blocks.split([rank * part.width for part in self.parts], dim=1)
        return {
            part.name: piece.unflatten(1, (rank, part.width)) for part, piece in zip(self.parts, pieces, strict=True)
        }

    def row_ids(
        self, leaves: Tensor, generic: Tensor | bool = False, levels: Sequence[int] | None = None
    ) -> dict[int, Tensor]:
        """Rows of every level's table for leaves int64, one per sequence [B] or token [B, T]; the same shape.

        Args:
            leaves: MISSING where there is none: no level gives a block.
            generic: bool that broadcasts to the leaves, or one for all: where generic blocks take the place of the
                leaf's, also of a missing one.
            levels: those that are switched on; default all. Others are left out of the result.

        Raises:
            ValueError: a leaf outside the tree, or generic blocks of a bank without.
        """
        last = self.clusters(len(self.ranks)) - 1
        if leaves.numel() and not MISSING <= int(leaves.min()) <= int(leaves.max()) <= last:
            raise ValueError(
                f"addresses from {int(leaves.min())} to {int(leaves.max())}: leaves of this bank's tree count from 0 "
                f"to {last}; use addresses of a tree with {len(self.ranks)} levels of {self.children} children"
            )
        drawn = torch.as_tensor(generic, device=leaves.device)
        if not self.generic and bool(drawn.any()):
            raise ValueError("this bank has no generic blocks; train it with bank.generic.probability above 0")
        found = {}
        for level in self.levels if levels is None else sorted(set(levels) & set(self.levels)):
            # Rounding down keeps MISSING, which is -1, what it is.
            rows = leaves.div(self.children ** (len(self.ranks) - level), rounding_mode="floor")
            found[level] = torch.where(drawn, self.generic_row(level), rows) if self.generic else rows
        return found

    def initial_rows(self, seed: int, level: int, start: int, stop: int) -> Tensor:
        """First values of rows [start, stop) of a level's table, fp32 [stop - start, row values].

        They follow from the seed, the level, the numbers of the rows and those of the layers alone.
        """
        out = torch.zeros(stop - start, self.row_values(level))
        for layer, blocks in self.by_layer(out, level).items():
            values = self.by_part(blocks)
            for part in self.parts:
                for cluster, block in enumerate(values[part.name], start):
                    name = f"{layer_bank_name(layer, level)}.{cluster}.{part.name}"
                    if part.start == "normal":
                        block.copy_(truncated_normal(block.shape, self.init_std, seed, name))
                    elif part.start == "uniform":
                        bound = 1 / math.sqrt(part.width)
                        block.uniform_(-bound, bound, generator=generator_of(seed, name))
        return out


def _parts(shape: Shape) -> tuple[Part, ...]:
    """The parts of a block, from the widths of the model's matrices."""
    kind, hidden = shape.bank.kind, shape.hidden_size
    if kind == "ffn":
        return Part("gate", hidden, "normal"), Part("up", hidden, "normal"), Part("down", hidden, "zero")
    attention = shape.attention
    if kind == "kv":
        mla = attention.kind == "mla"
        key = attention.qk_nope_head_dim + attention.qk_rope_head_dim if mla else shape.head_dim
        value = attention.v_head_dim if mla else shape.head_dim
        heads = attention.num_heads
        return Part("keys", heads * key, "normal"), Part("values", heads * value, "zero")
    if kind == "lora_ffn":
        inner = shape.intermediate_size
        widths = {"gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden)}
    else:
        query = attention.num_heads * shape.head_dim
        key = (attention.num_kv_heads or attention.num_heads) * shape.head_dim
        widths = {
            "q_proj": (hidden, query),
            "k_proj": (hidden, key),
            "v_proj": (hidden, key),
            "o_proj": (query, hidden),
        }
    parts = []
    for projection in ADAPTED[kind]:
        read, written = widths[projection]
        parts += [Part(f"{projection}.a", read, "uniform"), Part(f"{projection}.b", written, "zero")]
    return tuple(parts)
