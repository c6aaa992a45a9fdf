"""How often the clusters of a memory bank have been used since the run began, and how long ago they were last trained.

The ranks of the first stage that has blocks count: tokens, by leaf, of the batches that each reads, and the last steps
of the rows that each owns. Both are saved with a checkpoint and are the same on every mesh.
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
        layout: of the model.
        tables: of this rank's stage by level; none where it does not count.
        first: whether this is the rank that saves what all have counted together.
    """

    def __init__(self, layout: BankLayout, tables: Mapping[int, Table], first: bool) -> None:
        self.layout, self.first = layout, first
        self.hits = torch.zeros(layout.clusters(len(layout.ranks)) + 1, dtype=torch.int64)
        """Tokens of this rank by leaf; the last are those of generic blocks. Those without blocks and padding are left
        out."""
        self.steps = torch.zeros(1, dtype=torch.int64)
        self.tables = dict(tables)
        self.last = {level: torch.zeros(len(table.local), dtype=torch.int32) for level, table in tables.items()}
        """Level -> last step that used each row of this rank, 0 for none."""

    def count(self, batches: Sequence[SequenceBatch]) -> None:
        """A step has been trained on these micro-batches."""
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
        """Steps since each of these rows of this rank was used before this step, int64; 0 for the first time. After it
        they have been used in this step."""
        last = self.last[level]
        found = torch.where(last[rows] > 0, self.steps - last[rows], 0)
        last[rows] = int(self.steps)
        return found

    def whole_hits(self) -> Tensor:
        """`hits` of all ranks, int64 on the host; collective over the world."""
        total = self.hits.to(local_device(), copy=True)
        dist.all_reduce(total)
        return total.cpu()

    def state(self, saving: bool) -> dict[str, Pieces]:
        """What this rank saves, or loads into in place. Collective over the world when saving: one rank has the counts
        of all from then on."""
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
    """Columns of a level's rows that hold what blocks write (down, b, values): the parts that start as zeros."""
    found, start = [], 0
    for _ in layout.layers:
        for part in layout.parts:
            stop = start + layout.ranks[level - 1] * part.width
            if part.start == "zero":
                found.append(slice(start, stop))
            start = stop
    return found
