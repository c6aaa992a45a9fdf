"""How often the clusters of a bank have been used since the run began, and how long ago they were last trained.

The ranks of the first stage with blocks count. Each counts the tokens per leaf of the batches that it reads, and notes
the last step of every row that it owns. Checkpoints hold both; they are the same on every mesh.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from kmem.checkpoint.bank.hits import HITS, STEPS, last_step_name
from kmem.checkpoint.pieces import Pieces
from kmem.data.batch import SequenceBatch
from kmem.model.bank_layout import GENERIC, BankLayout
from kmem.parallel.bank_step import addresses_of
from kmem.parallel.mesh import local_device
from kmem.tables.table import Table


class BankUsage:
    """The counts of one rank.

    Args:
        layout: layout of the model.
        tables: level -> table of this rank's stage; none if the stage does not count.
        first: whether this rank saves the sum of all counts.
    """

    def __init__(self, layout: BankLayout, tables: Mapping[int, Table], first: bool) -> None:
        self.layout, self.first = layout, first
        self.hits = torch.zeros(layout.clusters(len(layout.ranks)) + 1, dtype=torch.int64)
        """Tokens of this rank by leaf, and last the tokens of generic blocks. Tokens without blocks and padding do not
        count."""
        self.steps = torch.zeros(1, dtype=torch.int64)
        self.tables = dict(tables)
        self.last = {level: torch.zeros(len(table.local), dtype=torch.int32) for level, table in tables.items()}
        """Level -> last step that used each row of this rank; 0: none."""

    def count(self, batches: Sequence[SequenceBatch]) -> None:
        """Count a step that was trained on these micro-batches."""
        self.steps += 1
        if not self.tables:
            return
        for batch in batches:
            addresses = addresses_of(batch)
            real = torch.ones_like(batch.input_ids) if batch.padding is None else (~batch.padding).long()
            tokens = real if addresses.dim() == 2 else real.sum(1)
            leaves = torch.where(addresses == GENERIC, len(self.hits) - 1, addresses)
            self.hits.index_add_(0, leaves[leaves >= 0], tokens[leaves >= 0])

    def ages(self, level: int, rows: Tensor) -> Tensor:
        """Steps since the previous use of these rows of this rank, int64; 0 on the first use. Marks the rows as used in
        this step."""
        last = self.last[level]
        ages = torch.where(last[rows] > 0, self.steps - last[rows], 0)
        last[rows] = int(self.steps)
        return ages

    def whole_hits(self) -> Tensor:
        """Sum of `hits` over all ranks, int64 on the host; collective over the world."""
        total = self.hits.to(local_device(), copy=True)
        dist.all_reduce(total)
        return total.cpu()

    def state(self, saving: bool) -> dict[str, Pieces]:
        """The pieces that this rank saves, or loads into in place. Collective over the world when saving: from then on
        one rank has the counts of all."""
        if saving:
            total = self.whole_hits()
            self.hits.copy_(total if self.first else torch.zeros_like(total))
        state = {STEPS: Pieces.interval(1, 0, self.steps)}
        if self.first:
            state[HITS] = Pieces.interval(len(self.hits), 0, self.hits)
        for level, last in self.last.items():
            state[last_step_name(level)] = self.tables[level].as_pieces(last.unsqueeze(1))
        return state


def written_columns(layout: BankLayout, level: int) -> list[slice]:
    """Columns of a level's rows with the parts that write (down, b, values); these parts start as zeros."""
    columns, start = [], 0
    for _ in layout.layers:
        for part in layout.parts:
            stop = start + layout.ranks[level - 1] * part.width
            if part.start == "zero":
                columns.append(slice(start, stop))
            start = stop
    return columns
