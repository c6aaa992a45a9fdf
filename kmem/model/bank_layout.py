"""The layout of a bank's blocks: contents, order, names and initial values.

A tree has p levels of k children: level l, from 1, has k^l clusters, numbered so that the children of node n are
n * k .. n * k + k - 1. Leaves are clusters of level p, and a leaf's cluster of level l is leaf // k^(p-l). Each cluster
of a level owns one block in each of the bank's layers.

Rows. The table of level l has one row per cluster. If the bank has generic blocks, they are one more row, the last. The
values of a row are ordered by layer, part, unit of the rank r, value of the unit. So a row is [layers, parts.., r,
width]; if all parts have the width d, as in the FFN, it is [layers, parts, r, d]. Matrices that produce hidden values
are stored transposed, one row per unit, so that every part has this form:

    kind        parts of a block, each [r, width], in this order                 width
    ffn         gate, up, down                                                   d
    lora_ffn    {gate_proj, up_proj, down_proj} x {a, b}                         d, f, d, f, f, d
    lora_qk     {q_proj, k_proj} x {a, b}                                        d, h e, d, g e
    lora_ov     {o_proj, v_proj} x {a, b}                                        h e, d, d, g e
    kv          keys, values                                                     h e, h e'

d is the hidden size, f the width of the dense feed-forward, h the number of query heads, g the number of key/value
heads, e the width of a query head and e' the width of a value head.

Names. Checkpoints hold one tensor per layer and level, `layers.{i}.bank.level{l}` [rows, values of a block]. A pipeline
stage holds a range of columns of the rows, which is one or more of these tensors as a whole; a rank of the stage holds
an interval of their rows. So a checkpoint loads on any mesh. The optimizer state of a row must be kept per layer, too:
one number per row of a stage would depend on the layers of the stage. Exports hold whole rows, `bank.level{l}` [rows,
layers * values], in row ranges `bank.level{l}.parts.{j}`: a context then reads one piece of a file per level.

Initial values. Blocks start as a no-op: the parts that write to the layer (down, b, values) are zero. All others are
drawn from a generator per seed, layer, level, cluster and part, so they do not depend on how tables are sharded.
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

# Shape letters: B sequences, T tokens, U blocks of a level, r rank.

MISSING = -1
"""Stands for a leaf or a row that is missing: no block."""
GENERIC = -2
"""Stands for a leaf in the addresses of a training batch: use the generic blocks."""
ADAPTED = {
    "lora_ffn": ("gate_proj", "up_proj", "down_proj"),
    "lora_qk": ("q_proj", "k_proj"),
    "lora_ov": ("o_proj", "v_proj"),
}
"""Kind -> projections that have low-rank updates."""


def bank_table_name(level: int) -> str:
    """Name of the table of a level over all layers, [rows, layers * values of a block]; exports hold its parts."""
    return f"bank.level{level}"


def bank_table_part_name(level: int, part: int) -> str:
    """Name of one row range of a level's table in an export."""
    return f"{bank_table_name(level)}.parts.{part}"


def layer_bank_name(layer: int, level: int) -> str:
    """Name of the blocks of one level and layer in a checkpoint, [rows, values of a block]."""
    return f"layers.{layer}.bank.level{level}"


class Part(NamedTuple):
    """A matrix [r, width] of a block."""

    name: str
    width: int
    start: str
    """Distribution of the initial values. zero; normal: truncated, with the model's standard deviation; uniform: within
    1 / sqrt(width), as in LoRA."""


@dataclass(frozen=True)
class BankLayout:
    """The layout of a model's bank, or of the part that belongs to the layers of a stage."""

    kind: str
    children: int
    ranks: tuple[int, ...]
    """Rank of the blocks of every level; 0: the level has no blocks."""
    layers: tuple[int, ...]
    """Layers that have blocks, ascending."""
    parts: tuple[Part, ...]
    """Parts of one block, in order."""
    alpha: float
    generic: bool
    """Whether the last row of every table holds generic blocks."""
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
        """The layout for the given layers only; layers without blocks are left out."""
        return replace(self, layers=tuple(layer for layer in self.layers if layer in layers))

    def check_tree(self, record: Mapping[str, Any], where: str | Path) -> None:
        """Refuse a cluster tree unless it has the bank's numbers of levels and children: others cannot address it.

        Args:
            record: contents of the tree's tree.json.
            where: the tree's folder, for the message.

        Raises:
            ValueError: names the field of the model's section, both numbers and the remedy.
        """
        children, tree_levels, levels = record["children"], record["levels"], len(self.ranks)
        if children != self.children:
            raise ValueError(
                f"model.bank.children: {self.children}, but the tree has {children} ({where}); set {children}, or "
                f"make a tree with kmem data cluster --children {self.children}"
            )
        if tree_levels != levels:
            change = (
                "write a rank of 0 for each level without blocks" if levels < tree_levels else "drop the last ranks"
            )
            raise ValueError(
                f"model.bank.levels: {levels}, but the tree has {tree_levels} ({where}); {change}, or make a tree "
                f"with kmem data cluster --levels {levels}"
            )

    @property
    def levels(self) -> tuple[int, ...]:
        """Levels that have blocks, counted from 1."""
        return tuple(level for level, rank in enumerate(self.ranks, 1) if rank)

    def clusters(self, level: int) -> int:
        """Number of clusters of a level of the tree."""
        return self.children**level

    def rows(self, level: int) -> int:
        """Number of rows of a level's table, the generic row included."""
        return self.clusters(level) + self.generic

    def subtree_rows(self, level: int, paths: Sequence[Sequence[int]]) -> list[range]:
        """Rows of a level's table that text of the given subtrees uses, ascending and joined where they touch: the rows
        of all clusters inside the subtrees, of the clusters above them, and the generic row.

        Args:
            paths: paths of the subtrees from the root down, such as (3, 7).
        """
        used = []
        for path in paths:
            number = 0
            for child in path[:level]:
                number = number * self.children + child
            below = self.children ** max(0, level - len(path))
            used.append(range(number * below, (number + 1) * below))
        if self.generic:
            used.append(range(self.generic_row(level), self.rows(level)))
        joined: list[range] = []
        for rows in sorted(used, key=lambda rows: rows.start):
            if joined and rows.start <= joined[-1].stop:
                joined[-1] = range(joined[-1].start, max(joined[-1].stop, rows.stop))
            else:
                joined.append(rows)
        return joined

    def generic_row(self, level: int) -> int:
        """The row of the generic blocks; the bank must have them."""
        assert self.generic, "this bank has no generic blocks"
        return self.clusters(level)

    def block_values(self, level: int) -> int:
        """Number of values of a cluster's block in one layer."""
        return self.ranks[level - 1] * sum(part.width for part in self.parts)

    def row_values(self, level: int) -> int:
        """Number of values of a row: a cluster's blocks in all layers."""
        return len(self.layers) * self.block_values(level)

    @property
    def fetched_values(self) -> int:
        """Number of values that a context fetches: one block per level and layer."""
        return sum(self.row_values(level) for level in self.levels)

    @property
    def bank_values(self) -> int:
        """Number of values of all clusters; the generic blocks have `fetched_values` more."""
        return sum(self.clusters(level) * self.row_values(level) for level in self.levels)

    def by_layer(self, rows: Tensor, level: int) -> dict[int, Tensor]:
        """Rows [.., row values] of a level's table -> layer -> its blocks [.., values], as views."""
        return dict(zip(self.layers, rows.split(self.block_values(level), dim=-1), strict=True))

    def by_part(self, blocks: Tensor) -> dict[str, Tensor]:
        """Blocks [U, values] of one layer and level -> name of the part -> [U, r, width], as views."""
        rank = blocks.shape[1] // sum(part.width for part in self.parts)
        pieces = blocks.split([rank * part.width for part in self.parts], dim=1)
        return {
            part.name: piece.unflatten(1, (rank, part.width)) for part, piece in zip(self.parts, pieces, strict=True)
        }

    def row_ids(
        self, leaves: Tensor, generic: Tensor | bool = False, levels: Sequence[int] | None = None
    ) -> dict[int, Tensor]:
        """Level -> row ids of its table, int64, in the shape of the leaves.

        Args:
            leaves: int64, one per sequence [B] or token [B, T]; MISSING: no block on any level.
            generic: bool tensor that broadcasts to the leaves, or one bool for all: True takes the generic blocks
                instead of the leaf's blocks, also for a missing leaf.
            levels: levels that are on; default: all. The others are left out of the result.

        Raises:
            ValueError: a leaf lies outside the tree, or the bank has no generic blocks and they are asked for.
        """
        last = self.clusters(len(self.ranks)) - 1
        if leaves.numel() and not MISSING <= int(leaves.min()) <= int(leaves.max()) <= last:
            raise ValueError(
                f"addresses from {int(leaves.min())} to {int(leaves.max())}: the leaves of this bank's tree are 0 to "
                f"{last}; use addresses of a tree with {len(self.ranks)} levels of {self.children} children"
            )
        is_generic = torch.as_tensor(generic, device=leaves.device)
        if not self.generic and bool(is_generic.any()):
            raise ValueError("this bank has no generic blocks; train it with bank.generic.probability above 0")
        ids = {}
        for level in self.levels if levels is None else sorted(set(levels) & set(self.levels)):
            # Rounding down maps MISSING (-1) to itself.
            rows = leaves.div(self.children ** (len(self.ranks) - level), rounding_mode="floor")
            ids[level] = torch.where(is_generic, self.generic_row(level), rows) if self.generic else rows
        return ids

    def initial_rows(self, seed: int, level: int, start: int, stop: int) -> Tensor:
        """Initial values of rows [start, stop) of a level's table, fp32 [stop - start, row values].

        They depend on the seed, the level, the row numbers and the layer numbers alone.
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
