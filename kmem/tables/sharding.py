"""The rows of a table, and their owners. Each rank owns a contiguous range; the first `rows % ranks` ranges are one row
longer."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor


def row_range(rows: int, ranks: int, rank: int) -> range:
    """The rows of one rank; the range may be empty if there are fewer rows than ranks."""
    base, longer = divmod(rows, ranks)
    start = rank * base + min(rank, longer)
    return range(start, start + base + (rank < longer))


def boundaries(rows: int, ranks: int) -> np.ndarray:
    """[ranks + 1] int64: the rows of rank r are [boundaries[r], boundaries[r + 1])."""
    return np.array([*(row_range(rows, ranks, rank).start for rank in range(ranks)), rows], np.int64)


@dataclass(frozen=True)
class RowSelection:
    """The rows of a larger table that a table holds. Checkpoints use the row numbers of the larger table.

    Args:
        whole: number of rows of the larger table.
        ranges: ranges of its rows that are selected, ascending and disjoint.
    """

    whole: int
    ranges: tuple[range, ...]

    def __len__(self) -> int:
        return sum(map(len, self.ranges))

    def places(self, rows: Tensor) -> Tensor:
        """Row numbers of the larger table, int64 -> row numbers of this table, in the same order."""
        starts, stops, before = self._borders
        part = torch.searchsorted(starts, rows, right=True) - 1
        assert bool(((part >= 0) & (rows < stops[part])).all()), "the table does not have these rows"
        return rows - starts[part] + before[part]

    @cached_property
    def _borders(self) -> tuple[Tensor, Tensor, Tensor]:
        """For each range: its first row, its end, and the number of selected rows before it; int64."""
        starts, stops = (torch.tensor([getattr(rows, end) for rows in self.ranges]) for end in ("start", "stop"))
        return starts, stops, torch.tensor([0, *accumulate(map(len, self.ranges))])

    def cut(self, start: int, stop: int) -> Iterator[tuple[int, range]]:
        """Cut rows [start, stop) of this table into contiguous pieces of the larger table. Yields, for each piece, the
        number of rows before it and its row numbers in the larger table."""
        before = 0
        for rows in self.ranges:
            low, high = max(start, before), min(stop, before + len(rows))
            if low < high:
                yield low - start, range(rows.start + low - before, rows.start + high - before)
            before += len(rows)
