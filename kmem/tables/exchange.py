"""All-to-all exchange over the ranks that share a table: row ids to the owners, rows back, gradients to the owners.

Every rank sorts its unique ids, and every owner has a contiguous range of rows. So a request is the id array cut at the
owners' boundaries, and the answers arrive in the order of the ids. Arrays are numpy arrays in host memory. The group is
a separate gloo group, which needs no device and may run beside the collectives of the main thread.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from kmem.config import UserError
from kmem.tables.sharding import boundaries

# Shape letters: N ranks, U unique rows that this rank asks for (asked), W rows that all ranks want from it (wanted).


class ExchangeError(UserError):
    """The exchange between the ranks of a table has failed."""


def join_groups(groups: Sequence[Sequence[int]], timeout_seconds: float) -> dist.ProcessGroup | None:
    """Create the groups of all stages for table exchanges, and return this rank's group.

    None if there is no process group, or if this rank's group has no other rank. Collective over the world: every rank
    passes the same groups in the same order. The timeout is shorter than the training run's own: only a timeout reveals
    a rank that is alive but does not take part.
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
    """The row ids of one step, from this rank's view as asker and as owner.

    Args:
        asked: [N], number of rows asked from each owner; the rows are consecutive in the unique ids.
        wanted_counts: [N], number of rows that each asker wants from this owner.
        wanted: [W] int64, local numbers of the wanted rows, sorted by asker, then ascending.
    """

    asked: np.ndarray
    wanted_counts: np.ndarray
    wanted: np.ndarray


class Exchange:
    """The collectives of one worker thread. With one rank, the same calls move nothing."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.ranks = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        self.bytes = 0
        """Number of bytes that this rank has sent to other ranks."""

    def request(self, unique: np.ndarray, rows: int) -> Request:
        """Tell the owners of a table of `rows` rows which rows this rank wants; `unique`: int64 [U], ascending."""
        edges = boundaries(rows, self.ranks)
        asked = np.diff(np.searchsorted(unique, edges))
        ones = np.ones(self.ranks, np.int64)
        wanted_counts = self._move(asked, ones, ones)
        wanted = self._move(unique, asked, wanted_counts) - edges[self.rank]
        return Request(asked, wanted_counts, wanted)

    def to_askers(self, request: Request, values: np.ndarray) -> np.ndarray:
        """Values of the wanted rows [W, ...] -> values of the asked rows [U, ...]."""
        return self._move(values, request.wanted_counts, request.asked)

    def to_askers_where(
        self, request: Request, send_mask: np.ndarray, values: np.ndarray, recv_mask: np.ndarray
    ) -> np.ndarray:
        """As `to_askers`, for some of the rows. Owners send the rows that bool `send_mask` [W] marks; `values` holds
        only these. Askers receive the rows that bool `recv_mask` [U] marks."""
        send, receive = _true_per_part(send_mask, request.wanted_counts), _true_per_part(recv_mask, request.asked)
        return self._move(values, send, receive)

    def to_owners(self, request: Request, values: np.ndarray) -> np.ndarray:
        """Values of the asked rows [U, ...] -> values of the wanted rows [W, ...]."""
        return self._move(values, request.asked, request.wanted_counts)

    def sum_over_ranks(self, values: np.ndarray, group: dist.ProcessGroup | None = None) -> None:
        """Sum an array over the ranks, or over the ranks of another group, in place."""
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
    """Number of True entries in each of the consecutive parts of a mask; `counts` gives the parts' lengths."""
    sums = np.concatenate([[0], np.cumsum(mask, dtype=np.int64)])
    return np.diff(sums[np.concatenate([[0], np.cumsum(counts)])])


def as_tensor(values: np.ndarray) -> torch.Tensor:
    """The array's memory as a tensor with a dtype that gloo can send; uint16 holds the bits of bf16."""
    if values.dtype == np.uint16:
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)
