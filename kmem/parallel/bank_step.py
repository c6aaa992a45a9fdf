"""Which blocks of a bank the micro-batches of a step use.

Addresses are leaves of the tree, one per token. A step's tables hand out each distinct row once, and a micro-batch uses
some of these rows. The plan depends only on the addresses and is the same for all layers of a stage. It is made on the
host, because grouping on a device waits for results.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kmem.data.batch import SequenceBatch
from kmem.model.bank_blocks import TokenGroups, group_tokens
from kmem.model.bank_fetched import distinct_rows
from kmem.model.bank_layout import GENERIC, MISSING, BankLayout
from kmem.tables.working_set import StepPlan


class BlockGroups(NamedTuple):
    """The tokens of a micro-batch by the blocks that they use."""

    groups: tuple[TokenGroups, ...]
    """Blocks are numbered as in the index of the step's plan; empty if no token has blocks."""

    def to(self, device: torch.device) -> "BlockGroups":
        return BlockGroups(tuple(group.to(device) for group in self.groups))


def addresses_of(batch: SequenceBatch) -> Tensor:
    """Addresses of a batch, int64 [n, T], or [n] if every sequence has only one address."""
    addresses = batch.addresses
    assert addresses is not None, "a model with a bank needs batches with addresses"
    return addresses[:, 0] if bool((addresses == addresses[:, :1]).all()) else addresses


def rows_of(layout: BankLayout, addresses: Tensor, level: int) -> Tensor:
    """Rows of a level's table for addresses of any shape: leaves, MISSING or GENERIC. MISSING where there is no row."""
    generic = addresses == GENERIC
    return layout.row_ids(addresses.masked_fill(generic, MISSING), generic, levels=[level])[level]


def plan_blocks(layout: BankLayout, batches: Sequence[SequenceBatch]) -> tuple[dict[int, StepPlan], list[BlockGroups]]:
    """Plan the look-ups of the micro-batches of a step.

    Returns:
        Level -> the distinct rows of the level's table, ascending, and the ones that each micro-batch uses; and for
        each micro-batch its tokens by their blocks.
    """
    used: list[dict[int, Tensor]] = []
    groups = []
    for batch in batches:
        addresses = addresses_of(batch)
        distinct = {level: distinct_rows(rows_of(layout, addresses, level)) for level in layout.levels}
        used.append({level: rows for level, (rows, _) in distinct.items()})
        counts = {level: len(rows) for level, (rows, _) in distinct.items()}
        places = {level: places for level, (_, places) in distinct.items()}
        groups.append(BlockGroups(group_tokens(places, counts, batch.input_ids.shape[1])))
    return {level: StepPlan.of([rows[level] for rows in used]) for level in layout.levels}, groups
