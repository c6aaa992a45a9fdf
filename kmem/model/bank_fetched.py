"""The bank of a whole model in one process: from leaves to the blocks of every layer that has a bank (hierarchical
memories, arXiv 2510.02375).

A bank has one lookup table per level; a row holds all blocks of one cluster of documents. `bank_layout` defines the
order and the names of its values, `bank_blocks` the computation. The address is a leaf of the tree of clusters, one per
sequence or per token. It is computed outside the model.

    ids = layout.row_ids(leaves)                          level -> row ids, MISSING for none
    FetchedBlocks.read(layout, ids, sources)              the distinct rows, and the row that each sequence uses
    .inputs(tokens)                                       layer -> BankInput, for `Decoder`

Training reads rows from sharded tables instead (`kmem.tables`) and makes the `BankInput` of a layer in the same way:
`distinct_rows` of the ids of a micro-batch, on the host; `group_tokens` of the places, once for all layers; then, in
each layer, that layer's columns of the distinct rows (`BankLayout.by_layer`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .bank_blocks import BankInput, group_tokens
from .bank_layout import MISSING, BankLayout
from .export_tables import RowSource

# Shape letters: B sequences, T tokens, U distinct rows, V values of a row.


def distinct_rows(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Row ids int64 of any shape, MISSING for none -> (distinct rows [U], ascending; the place of every id among them,
    in the shape of the ids, MISSING for a missing id)."""
    present = ids != MISSING
    rows, places = torch.unique(ids[present], return_inverse=True)
    return rows, torch.full_like(ids, MISSING).masked_scatter_(present, places)


@dataclass(frozen=True)
class FetchedBlocks:
    """The blocks of a batch of sequences in all layers. In generation, every forward pass of a context uses them."""

    layout: BankLayout
    rows: Mapping[int, Tensor]
    """Level -> [U, V], distinct rows."""
    places: Mapping[int, Tensor]
    """Level -> int64 [B] or [B, T] on the host: which of `rows` each sequence or token uses; MISSING: none."""

    @classmethod
    def read(cls, layout: BankLayout, ids: Mapping[int, Tensor], sources: Mapping[int, RowSource]) -> "FetchedBlocks":
        """Read every distinct row once.

        Args:
            ids: the result of `layout.row_ids`; best on the host, since they are read there.
            sources: level -> function from row ids [U] to rows [U, V], such as a `RowTable` or `MappedRows`; one for
                every level of the ids.
        """
        distinct = {level: distinct_rows(level_ids.cpu()) for level, level_ids in ids.items()}
        rows = {level: sources[level](unique) for level, (unique, _) in distinct.items()}
        return cls(layout, rows, {level: places for level, (_, places) in distinct.items()})

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "FetchedBlocks":
        """A copy with all rows on this device and, if given, of this dtype; sources may be on several devices."""
        return replace(self, rows={level: rows.to(device, dtype) for level, rows in self.rows.items()})

    def inputs(self, tokens: int) -> dict[int, BankInput]:
        """Layer -> the blocks that it reads for the next `tokens` tokens of all sequences."""
        blocks = {level: len(rows) for level, rows in self.rows.items()}
        groups = group_tokens(self.places, blocks, tokens)
        if groups:
            device, *others = {rows.device for rows in self.rows.values()}
            assert not others, "levels were read on several devices: call `to` first"
            groups = tuple(group.to(device) for group in groups)
        by_layer = {level: self.layout.by_layer(rows, level) for level, rows in self.rows.items()}
        return {
            layer: BankInput(self.layout, groups, {level: blocks[layer] for level, blocks in by_layer.items()})
            for layer in self.layout.layers
        }


def without_blocks(layout: BankLayout) -> dict[int, BankInput]:
    """Inputs for `Decoder` with which the model computes as without a bank."""
    return dict.fromkeys(layout.layers, BankInput(layout))
