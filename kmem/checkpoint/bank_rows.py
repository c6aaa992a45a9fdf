"""Rows of a checkpoint's memory bank by the paths of their clusters, and what is in them."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kmem.checkpoint.reader import CheckpointReader
from kmem.config import UserError
from kmem.model.bank_layout import BankLayout, layer_bank_name
from kmem.model.cluster_tree import cluster_of, format_path, parse_path, path_of

GENERIC_PATH = "generic"
"""In place of a path: the generic blocks of all levels."""
SLICE_BYTES = 32 << 20

Selection = dict[int, Tensor]
"""Level -> bool [rows of its table]."""


def select(layout: BankLayout, paths: list[str], subtree: bool = True) -> Selection:
    """The rows of clusters.

    Args:
        paths: such as `3` or `3.11`, from the root down, or `generic`.
        subtree: with all clusters below them.

    Raises:
        UserError: a path outside the tree, or of a cluster without blocks.
    """
    chosen = {level: torch.zeros(layout.rows(level), dtype=torch.bool) for level in layout.levels}
    for path in paths:
        if path == GENERIC_PATH:
            if not layout.generic:
                raise UserError("generic: this bank has no generic blocks (memory_bank.generic.probability is 0)")
            for level in layout.levels:
                chosen[level][layout.generic_row(level)] = True
            continue
        level, number = _cluster(layout, path)
        if level not in layout.levels and not (subtree and max(layout.levels) > level):
            below = "; add --subtree for the clusters below it" if max(layout.levels) > level else ""
            raise UserError(f"cluster {path}: level {level} of this bank has no blocks (its rank is 0){below}")
        for lower in layout.levels:
            if lower == level or (subtree and lower > level):
                below = layout.children ** (lower - level)
                chosen[lower][number * below : (number + 1) * below] = True
    return chosen


def cluster_path(layout: BankLayout, level: int, row: int) -> str:
    """How a row's cluster is written."""
    if layout.generic and row == layout.generic_row(level):
        return GENERIC_PATH
    return format_path(path_of(row, level, layout.children))


def _cluster(layout: BankLayout, text: str) -> tuple[int, int]:
    """Level and number of the cluster that a path names."""
    try:
        return cluster_of(parse_path(text), layout.children, len(layout.ranks))
    except ValueError as error:
        raise UserError(str(error)) from None


@dataclass(frozen=True)
class LevelFigures:
    """The blocks of a level."""

    norms: Tensor
    """fp64 [rows]: 2-norm, over all layers, of the parts that write (down, b, values), which start as zeros."""

    @property
    def untouched(self) -> Tensor:
        """bool [rows]: blocks that are the no-op they began as."""
        return self.norms == 0


def level_figures(reader: CheckpointReader, layout: BankLayout, level: int) -> LevelFigures:
    """Read once, a slice of the rows of one layer at a time."""
    squares = torch.zeros(layout.rows(level), dtype=torch.float64)
    for start, stop, layer in _slices(layout, level):
        parts = layout.by_part(reader.read_rows(layer_bank_name(layer, level), start, stop))
        for part in layout.parts:
            if part.start == "zero":
                squares[start:stop] += parts[part.name].double().square().sum(dim=(1, 2))
    return LevelFigures(squares.sqrt())


def changed_rows(reader: CheckpointReader, start_from: CheckpointReader, layout: BankLayout, level: int) -> Tensor:
    """Rows that differ from those of another checkpoint; bool [rows]."""
    changed = torch.zeros(layout.rows(level), dtype=torch.bool)
    for start, stop, layer in _slices(layout, level):
        name = layer_bank_name(layer, level)
        one, other = (found.read_rows(name, start, stop) for found in (reader, start_from))
        changed[start:stop] |= (one != other).any(dim=1)
    return changed


def _slices(layout: BankLayout, level: int) -> Iterator[tuple[int, int, int]]:
    """(first row, end, layer) of pieces of a level that fit into memory."""
    rows = max(1, SLICE_BYTES // (layout.block_values(level) * torch.float32.itemsize))
    for layer in layout.layers:
        for start in range(0, layout.rows(level), rows):
            yield start, min(start + rows, layout.rows(level)), layer
