"""Which rows a table has, and which rank owns which: contiguous ranges, the first `rows % ranks` one row longer."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class RowRange:
    """Rows [start, stop) of a table."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def row_range(rows: int, ranks: int, rank: int) -> RowRange:
    """The rows of one rank; ranges may be empty where there are fewer rows than ranks."""
    base, longer = divmod(rows, ranks)
    start = rank * base + min(rank, longer)
    return RowRange(start, start + base + (rank < longer))


def boundaries(rows: int, ranks: int) -> np.ndarray:
    """[ranks + 1] int64: the rows of rank r are [boundaries[r], boundaries[r + 1])."""
    return np.array([*(row_range(rows, ranks, rank).start for rank in range(ranks)), rows], np.int64)


@dataclass(frozen=True)
class RowSelection:
    """Rows that a table has of a larger one, whose numbers they have in checkpoints.

    Args:
        whole: rows of the larger one.
        ranges: of these, ascending and apart.
    """

    whole: int
    ranges: tuple[range, ...]

    def __len__(self) -> int:
        return sum(map(len, self.ranges))

    def places(self, rows: Tensor) -> Tensor:
        """Where rows, numbered as in the whole, int64, lie among these; ascending ones stay ascending."""
        starts, stops, before = self._borders
        part = torch.searchsorted(starts, rows, right=True) - 1
        assert bool(((part >= 0) & (rows < stops[part])).all()), "the table does not have these rows"
        return rows - starts[part] + before[part]

    @cached_property
    def _borders(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of each range its first row, its end, and the rows before it; int64."""
        starts, stops = (torch.tensor([getattr(rows, end) for rows in self.ranges]) for end in ("start", "stop"))
        return starts, stops, torch.tensor([0, *accumulate(map(len, self.ranges))])

    def cut(self, start: int, stop: int) -> Iterator[tuple[int, range]]:
        """Rows [start, stop) of these as pieces that lie together: how many come before each, and its numbers in the
        whole."""
        before = 0
        for rows in self.ranges:
            low, high = max(start, before), min(stop, before + len(rows))
            if low < high:
                yield low - start, range(rows.start + low - before, rows.start + high - before)
            before += len(rows)
