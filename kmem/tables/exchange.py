"""Ids to the owners of rows, rows back, gradients to the owners: all-to-all over the ranks that share a table.

Every rank sorts its unique ids, and ranges of rows are contiguous, so a request is the id array cut at the owners'
boundaries, and answers come back in the order of the ids. Arrays are numpy's, in host memory: the group is a gloo group
of its own, which needs no device and may run beside the collectives of the main thread.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from kmem.config import UserError
from kmem.tables.sharding import boundaries


class ExchangeError(UserError):
    """The ranks of a table no longer answer each other."""


def join_groups(groups: Sequence[Sequence[int]], timeout_seconds: float) -> dist.ProcessGroup | None:
    """This rank's group for table exchanges, among those of all stages, which every rank names in the same order.

    None when there is no process group, or the own group is this rank alone. Collective over the world. The timeout
    is short of a training run's: a rank that is alive but absent shows only there.
    """
    if not dist.is_initialized():
        return None
    mine = None
    for ranks in groups:
        group = dist.new_group(list(ranks), backend="gloo", timeout=timedelta(seconds=timeout_seconds))
        if dist.get_rank() in ranks and len(ranks) > 1:
            mine = group
    return mine


@dataclass(frozen=True)
class Request:
    """One step's ids as the asker and as the owner see them. N ranks.

    Args:
        asked: [N] rows asked from each owner, in the order of the unique ids.
        wanted_counts: [N] rows that each asker wants from this owner.
        wanted: [W] int64: their local numbers, by asker, ascending within an asker.
    """

    asked: np.ndarray
    wanted_counts: np.ndarray
    wanted: np.ndarray


class Exchange:
    """Collectives of one worker thread. With one rank the same calls move nothing."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.ranks = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        self.bytes = 0
        """Bytes that this rank has sent to others."""

    def request(self, unique: np.ndarray, rows: int) -> Request:
        """Tell the owners of a table of `rows` rows which ones this rank wants; `unique` ascending int64."""
        edges = boundaries(rows, self.ranks)
        asked = np.diff(np.searchsorted(unique, edges))
        ones = np.ones(self.ranks, np.int64)
        wanted_counts = self._move(asked, ones, ones)
        wanted = self._move(unique, asked, wanted_counts) - edges[self.rank]
        return Request(asked, wanted_counts, wanted)

    def to_askers(self, request: Request, values: np.ndarray) -> np.ndarray:
        """Values of the wanted rows [W, ...] -> values of the asked rows [U, ...]."""
        return self._move(values, request.wanted_counts, request.asked)

    def to_askers_where(self, request: Request, sent: np.ndarray, values: np.ndarray, due: np.ndarray) -> np.ndarray:
        """As `to_askers` for some of the rows: owners send where `sent` [W], askers receive where `due` [U]."""
        return self._move(values, _true_per_part(sent, request.wanted_counts), _true_per_part(due, request.asked))

    def to_owners(self, request: Request, values: np.ndarray) -> np.ndarray:
        """Values of the asked rows [U, ...] -> values of the wanted rows [W, ...]."""
        return self._move(values, request.asked, request.wanted_counts)

    def sum_over_ranks(self, values: np.ndarray, group: dist.ProcessGroup | None = None) -> None:
        """Add up an array over the ranks, or over those of another group, in place."""
        group = group or self._group
        if group is not None:
            self.bytes += values.nbytes
            dist.all_reduce(torch.from_numpy(values), group=group)

    def _move(self, values: np.ndarray, send: np.ndarray, receive: np.ndarray) -> np.ndarray:
        if self._group is None:
            return values
        values = np.ascontiguousarray(values)
        received = np.empty((int(receive.sum()), *values.shape[1:]), values.dtype)
        self.bytes += values.nbytes - values[:1].nbytes * int(send[self.rank])
        dist.all_to_all_single(
            as_tensor(received), as_tensor(values), receive.tolist(), send.tolist(), group=self._group
        )
        return received


def _true_per_part(mask: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Number of true entries in each of the consecutive parts of a mask."""
    sums = np.concatenate([[0], np.cumsum(mask, dtype=np.int64)])
    return np.diff(sums[np.concatenate([[0], np.cumsum(counts)])])


def as_tensor(values: np.ndarray) -> torch.Tensor:
    """The same memory as a tensor of a type that gloo sends; uint16 holds the bits of bf16."""
    if values.dtype == np.uint16:
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)
