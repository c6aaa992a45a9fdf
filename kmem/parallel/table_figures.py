"""Counts and times of a kind's tables in a step, over all ranks: two small all-reduces."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kmem.parallel.memory_kind import BegunStep
from kmem.parallel.mesh import local_device
from kmem.tables.table import Table

COUNTS = ("addresses", "unique_rows", "conflict_rows", "owned_rows")
TIMES = ("stall_ms", "fetch_ms")
NORM_SAMPLE = 2048
"""Number of rows whose norms are sampled, evenly spaced over a table."""


def table_figures(
    tables: Sequence[Table | None],
    step: BegunStep,
    rows: Sequence[int],
    sums: Tensor | None = None,
    largest: Tensor | None = None,
    counted: bool = True,
) -> tuple[list[dict[str, Any]], Tensor, Tensor]:
    """Figures of n places, such as layers, each of which has a table on one stage or on several. Collective over the
    world.

        addresses       rows looked up by all tokens of the global batch
        unique_rows     distinct rows that ranks asked for, summed over ranks
        conflict_rows   requested rows that had to wait for the update of an earlier step
        touched_rows    distinct rows of the table that the global batch looked up
        touch_density   touched rows as a share of the table's rows
        bytes           sent between ranks for the updates finished since the last step, and for their fetches
        stall_ms        longest time that a rank waited for rows
        fetch_ms        longest time that a rank's worker took from ids to rows
        owner_ms        longest time of a row optimizer in the updates finished since the last step

    Args:
        tables: of each place, the table that this rank shares, if any.
        rows: rows of each place's table.
        sums: fp64 [n, a], further numbers of this rank, to be summed over the ranks.
        largest: fp64 [n, b], further numbers, of which the largest over the ranks is taken.
        counted: whether this rank's rows count; not where another stage counts the same look-ups.

    Returns:
        (figures of each place, the sums, the largest), the latter on the compute device.
    """
    counts = torch.zeros(len(tables), len(COUNTS) + 1, dtype=torch.float64)
    times = torch.zeros(len(tables), len(TIMES) + 1, dtype=torch.float64)
    for place, table in enumerate(tables):
        if table is not None:
            metrics, finished = step.tickets[table.spec.name].metrics, table.take_metrics()
            sent, owner = sum(update.bytes for update in finished), sum(update.owner_ms for update in finished)
            counts[place] = torch.tensor([*(getattr(metrics, name) * counted for name in COUNTS), sent])
            times[place] = torch.tensor([*(getattr(metrics, name) for name in TIMES), owner])
    device = local_device()
    empty = torch.zeros(len(tables), 0, dtype=torch.float64)
    all_sums = torch.cat([part.to(device) for part in (counts, empty if sums is None else sums)], dim=1)
    all_largest = torch.cat([part.to(device) for part in (times, empty if largest is None else largest)], dim=1)
    dist.all_reduce(all_sums)
    dist.all_reduce(all_largest, op=dist.ReduceOp.MAX)
    figures = []
    for (addresses, unique, conflict, touched, sent), (stall, fetch, owner), total in zip(
        all_sums[:, : counts.shape[1]].tolist(), all_largest[:, : times.shape[1]].tolist(), rows, strict=True
    ):
        figures.append(
            {
                "addresses": int(addresses),
                "unique_rows": int(unique),
                "conflict_rows": int(conflict),
                "touched_rows": int(touched),
                "touch_density": touched / total,
                "bytes": int(sent),
                "stall_ms": stall,
                "fetch_ms": fetch,
                "owner_ms": owner,
            }
        )
    return figures, all_sums[:, counts.shape[1] :], all_largest[:, times.shape[1] :]


def row_norms(tables: Sequence[Table | None]) -> list[dict[str, float]]:
    """Of each place, percentiles of the norms of a sample of its rows. Collective over the world."""
    norms = torch.zeros(len(tables), NORM_SAMPLE, dtype=torch.float64)
    for place, table in enumerate(tables):
        if table is not None:
            norms[place] = table.row_norms(NORM_SAMPLE)
    norms = norms.to(local_device())
    dist.all_reduce(norms)
    shares = {"p1": 0.01, "p50": 0.5, "p99": 0.99, "max": 1.0}
    return [{name: float(torch.quantile(row, share)) for name, share in shares.items()} for row in norms]
