"""The bank of a whole model in one process: from leaves to the blocks of every layer that has a bank (hierarchical
memories, arXiv 2510.02375).

A bank has one lookup table per level; a row holds all blocks of one cluster of documents. `bank_layout` defines the
order and the names of its values, `bank_blocks` the computation. The address is a leaf of the tree of clusters, one per
sequence or per token. It is computed outside the model.

    ids = layout.row_ids(leaves)                          level -> row ids, MISSING for none
    distinct_rows(level_ids)                              the distinct rows of a level, and which of them are used where
    inputs_of_blocks(layout, rows, places, tokens)        layer -> BankInput, for `Decoder`

Training reads rows from sharded tables instead (`kmem.tables`) and makes the `BankInput` of a layer in the same way:
`distinct_rows` of the ids of a micro-batch, on the host; `group_tokens` of the places, once for all layers; then, in
each layer, that layer's columns of the distinct rows (`BankLayout.by_layer`).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from .bank_blocks import BankInput, group_tokens
from .bank_layout import MISSING, BankLayout

# Shape letters: B sequences, T tokens, U distinct rows, V values of a row.


def distinct_rows(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Row ids int64 of any shape, MISSING for none -> (distinct rows [U], ascending; the place of every id among them,
    in the shape of the ids, MISSING for a missing id)."""
    present = ids != MISSING
    rows, places = torch.unique(ids[present], return_inverse=True)
    return rows, torch.full_like(ids, MISSING).masked_scatter_(present, places)


def inputs_of_blocks(
    layout: BankLayout, rows: Mapping[int, Tensor], places: Mapping[int, Tensor], tokens: int
) -> dict[int, BankInput]:
    """Layer -> the blocks that it reads for the next `tokens` tokens of a batch of sequences. In generation, every
    forward pass of a context uses the same rows.

    Args:
        rows: level -> [U, V], distinct rows, all on one device.
        places: level -> int64 [B] or [B, T] on the host: which of `rows` each sequence or token uses; MISSING: none.
    """
    groups = group_tokens(places, {level: len(values) for level, values in rows.items()}, tokens)
    if groups:
        device, *others = {values.device for values in rows.values()}
        assert not others, "levels were read on several devices"
        groups = tuple(group.to(device) for group in groups)
    by_layer = {level: layout.by_layer(values, level) for level, values in rows.items()}
    return {
        layer: BankInput(layout, groups, {level: blocks[layer] for level, blocks in by_layer.items()})
        for layer in layout.layers
    }


def without_blocks(layout: BankLayout) -> dict[int, BankInput]:
    """Inputs for `Decoder` with which the model computes as without a bank."""
    return dict.fromkeys(layout.layers, BankInput(layout))
