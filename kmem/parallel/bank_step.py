"""Which blocks of a memory bank the micro-batches of a step use.

Addresses are leaves of the tree, one per token; a step's tables hand out each distinct row once, and a micro-batch uses
some of these rows. All of it follows from the addresses, is the same for all layers of a stage, and is made on the
host: grouping on a device waits for results.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kmem.data.batch import SequenceBatch
from kmem.model.bank_blocks import TokenGroups, group_tokens
from kmem.model.bank_fetched import distinct_rows
from kmem.model.bank_layout import GENERIC, MISSING, BankLayout


@dataclass(frozen=True)
class MicroBatchBlocks:
    """The blocks of a micro-batch."""

    rows: Mapping[int, Tensor]
    """Level -> int64 [u], which of the step's rows it uses, ascending."""
    groups: tuple[TokenGroups, ...]
    """Its tokens by the blocks that they use, which are numbered as in `rows`; empty where no token has any."""

    def to(self, device: torch.device) -> "MicroBatchBlocks":
        rows = {level: places.to(device) for level, places in self.rows.items()}
        return MicroBatchBlocks(rows, tuple(group.to(device) for group in self.groups))


def addresses_of(batch: SequenceBatch) -> Tensor:
    """Addresses of a batch, int64 [n, T], or [n] where every sequence has one only."""
    addresses = batch.addresses
    assert addresses is not None, "a model with a memory bank needs batches with addresses"
    return addresses[:, 0] if bool((addresses == addresses[:, :1]).all()) else addresses


def rows_of(layout: BankLayout, addresses: Tensor, level: int) -> Tensor:
    """Rows of a level's table for addresses of any shape, which are leaves, MISSING or GENERIC; MISSING for none."""
    generic = addresses == GENERIC
    return layout.row_ids(addresses.masked_fill(generic, MISSING), generic, levels=[level])[level]


def step_rows(layout: BankLayout, level: int, batches: Sequence[SequenceBatch]) -> Tensor:
    """The distinct rows of a level's table that micro-batches use, int64 [U], ascending."""
    # Neighbours mostly have the same address: sorting starts from the few places where it changes.
    changes = [torch.unique_consecutive(addresses_of(batch).flatten()) for batch in batches]
    rows, _ = distinct_rows(rows_of(layout, torch.cat(changes), level))
    return rows


def step_blocks(layout: BankLayout, batches: Sequence[SequenceBatch]) -> list[MicroBatchBlocks]:
    """The blocks of each micro-batch of a step."""
    whole = {level: step_rows(layout, level, batches) for level in layout.levels}
    blocks = []
    for batch in batches:
        addresses = addresses_of(batch)
        distinct = {level: distinct_rows(rows_of(layout, addresses, level)) for level in layout.levels}
        rows = {level: torch.searchsorted(whole[level], used) for level, (used, _) in distinct.items()}
        counts = {level: len(used) for level, (used, _) in distinct.items()}
        places = {level: places for level, (_, places) in distinct.items()}
        blocks.append(MicroBatchBlocks(rows, group_tokens(places, counts, batch.input_ids.shape[1])))
    return blocks
