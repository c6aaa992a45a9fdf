"""All tables of a bank as parameters: the reference that other ways to read them are compared with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kmem.model.bank_blocks import BankInput
from kmem.model.bank_fetched import distinct_rows, inputs_of_blocks
from kmem.model.bank_layout import BankLayout, bank_table_name
from kmem.model.export_tables import RowSource, RowTable


@dataclass(frozen=True)
class FetchedBlocks:
    """The blocks of a batch of sequences in all layers."""

    layout: BankLayout
    rows: Mapping[int, Tensor]
    """Level -> [U, V], distinct rows."""
    places: Mapping[int, Tensor]
    """Level -> int64 [B] or [B, T]: which of `rows` each sequence or token uses; MISSING: none."""

    @classmethod
    def read(cls, layout: BankLayout, ids: Mapping[int, Tensor], sources: Mapping[int, RowSource]) -> "FetchedBlocks":
        """Read every distinct row once; `ids` is the result of `layout.row_ids`."""
        distinct = {level: distinct_rows(level_ids.cpu()) for level, level_ids in ids.items()}
        rows = {level: sources[level](unique) for level, (unique, _) in distinct.items()}
        return cls(layout, rows, {level: places for level, (_, places) in distinct.items()})

    def inputs(self, tokens: int) -> dict[int, BankInput]:
        """Layer -> the blocks that it reads for the next `tokens` tokens of all sequences."""
        return inputs_of_blocks(self.layout, self.rows, self.places, tokens)


class BankParameters(nn.Module):
    """All tables of a bank in device memory, as parameters."""

    def __init__(self, layout: BankLayout, parts: Mapping[int, Sequence[int]] | None = None) -> None:
        """`parts`: level -> number of rows of each part of its table; default: one part."""
        super().__init__()
        self.layout = layout
        for level in layout.levels:
            table = RowTable(list((parts or {}).get(level, [layout.rows(level)])), layout.row_values(level))
            self.add_module(bank_table_name(level).partition(".")[2], table)

    @property
    def sources(self) -> dict[int, RowSource]:
        """Level -> its table, from which rows are read."""
        return {level: self.table(level) for level in self.layout.levels}

    def table(self, level: int) -> RowTable:
        """The table of a level, [rows, V]."""
        table = self.get_submodule(bank_table_name(level).partition(".")[2])
        assert isinstance(table, RowTable)
        return table

    @torch.no_grad()
    def initialise_(self, seed: int) -> None:
        """Set every row to its initial values."""
        for level in self.layout.levels:
            start = 0
            for part in self.table(level).parts:
                part.copy_(self.layout.initial_rows(seed, level, start, start + len(part)))
                start += len(part)

    def forward(
        self, leaves: Tensor, generic: Tensor | bool = False, levels: Sequence[int] | None = None
    ) -> FetchedBlocks:
        """The blocks of leaves int64 [B] or [B, T]; takes the arguments of `BankLayout.row_ids`."""
        return FetchedBlocks.read(self.layout, self.layout.row_ids(leaves, generic, levels), self.sources)
