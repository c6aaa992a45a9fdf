"""The memory bank of a whole model in one process: leaves to the blocks of every layer that has some (hierarchical
memories, arXiv 2510.02375).

A bank is a lookup table per level whose row is everything that a cluster of documents owns: `bank_layout` has the order
and the names of its values, `bank_blocks` what they compute. The address is a leaf of the tree of clusters, one per
sequence or per token, and is made outside the model.

    ids = layout.row_ids(leaves)                          level -> rows, MISSING for none
    FetchedBlocks.read(layout, ids, sources)              distinct rows once, and which one everybody uses
    .inputs(tokens)                                       layer -> BankInput, for `Decoder(.., bank=)`

Training reads rows from sharded tables instead (`kmem.tables`) and brings a layer its `BankInput` in the same way:
`distinct_rows` of the ids of a micro-batch, on the host; `group_tokens` of the places, once for all layers; then, in
each layer, the columns of `BankLayout.by_layer` of the distinct rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .bank_blocks import BankInput, group_tokens
from .bank_layout import MISSING, BankLayout, bank_table_name
from .engram_reader import RowSource, RowTable

# Shape letters: B sequences, T tokens, U distinct rows, V values of a row.


def distinct_rows(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Row ids int64 of any shape, MISSING for none -> (ascending distinct rows [U], the place in them of every id, in
    the shape of the ids and MISSING where that is)."""
    there = ids != MISSING
    rows, places = torch.unique(ids[there], return_inverse=True)
    return rows, torch.full_like(ids, MISSING).masked_scatter_(there, places)


@dataclass(frozen=True)
class FetchedBlocks:
    """The blocks of a batch of sequences in all layers. In generation they serve every forward of a context."""

    layout: BankLayout
    rows: Mapping[int, Tensor]
    """Level -> [U, V], distinct rows."""
    places: Mapping[int, Tensor]
    """Level -> int64 [B] or [B, T] on the host, the row of every sequence or token; MISSING: none."""

    @classmethod
    def read(cls, layout: BankLayout, ids: Mapping[int, Tensor], sources: Mapping[int, RowSource]) -> "FetchedBlocks":
        """Every distinct row once.

        Args:
            ids: what `layout.row_ids` gives; best on the host, where they are looked at.
            sources: of every level that the ids have: row ids [U] -> rows [U, V], such as a `RowTable` or `MappedRows`.
        """
        distinct = {level: distinct_rows(found.cpu()) for level, found in ids.items()}
        rows = {level: sources[level](found) for level, (found, _) in distinct.items()}
        return cls(layout, rows, {level: places for level, (_, places) in distinct.items()})

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "FetchedBlocks":
        """The same with rows on this device and, if given, of this type: sources may be on several."""
        return replace(self, rows={level: rows.to(device, dtype) for level, rows in self.rows.items()})

    def inputs(self, tokens: int) -> dict[int, BankInput]:
        """What the bank of each layer holds for the next `tokens` tokens of all sequences."""
        blocks = {level: len(rows) for level, rows in self.rows.items()}
        groups = group_tokens(self.places, blocks, tokens)
        if groups:
            device, *others = {rows.device for rows in self.rows.values()}
            assert not others, "levels were read on several devices: call `to` first"
            groups = tuple(group.to(device) for group in groups)
        by_layer = {level: self.layout.by_layer(rows, level) for level, rows in self.rows.items()}
        return {
            layer: BankInput(self.layout, groups, {level: found[layer] for level, found in by_layer.items()})
            for layer in self.layout.layers
        }


def without_blocks(layout: BankLayout) -> dict[int, BankInput]:
    """What leaves a model as it is without memory, for `Decoder(.., bank=)`."""
    return dict.fromkeys(layout.layers, BankInput(layout))


class BankParameters(nn.Module):
    """All tables of a bank in device memory, as parameters."""

    def __init__(self, layout: BankLayout, parts: Mapping[int, Sequence[int]] | None = None) -> None:
        """`parts`: level -> rows of the parts of its table; default: one."""
        super().__init__()
        self.layout = layout
        for level in layout.levels:
            table = RowTable(list((parts or {}).get(level, [layout.rows(level)])), layout.row_values(level))
            self.add_module(bank_table_name(level).partition(".")[2], table)

    @property
    def sources(self) -> dict[int, RowSource]:
        """Level -> where its rows are read."""
        return {level: self.table(level) for level in self.layout.levels}

    def table(self, level: int) -> RowTable:
        """[rows, V]."""
        table = self.get_submodule(bank_table_name(level).partition(".")[2])
        assert isinstance(table, RowTable)
        return table

    @torch.no_grad()
    def initialise_(self, seed: int) -> None:
        """First values of every row."""
        for level in self.layout.levels:
            start = 0
            for part in self.table(level).parts:
                part.copy_(self.layout.initial_rows(seed, level, start, start + len(part)))
                start += len(part)

    def forward(
        self, leaves: Tensor, generic: Tensor | bool = False, levels: Sequence[int] | None = None
    ) -> FetchedBlocks:
        """The blocks of leaves int64 [B] or [B, T]; the arguments are those of `BankLayout.row_ids`."""
        return FetchedBlocks.read(self.layout, self.layout.row_ids(leaves, generic, levels), self.sources)
