"""Figures of a bank's tables in a step, over all ranks. They take two small all-reduces; sampled steps add two more, of
one number per leaf and of two numbers per row."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from kmem.checkpoint.bank.hits import hit_figures
from kmem.model.bank_layout import BankLayout
from kmem.parallel.bank_usage import BankUsage, written_columns
from kmem.parallel.memory_kind import BegunStep
from kmem.parallel.mesh import Mesh, local_device
from kmem.tables.table import Table

_COUNTS = ("unique_rows", "conflict_rows", "owned_rows")
_TIMES = ("stall_ms", "fetch_ms")


@dataclass(frozen=True)
class LevelBank:
    """Figures of a level of the bank in one step."""

    fetched_blocks: int
    """Distinct clusters whose blocks ranks asked for, summed over the data-parallel ranks."""
    conflict_blocks: int
    """Fetched clusters that had to wait for the update of an earlier step."""
    touched_blocks: int
    """Distinct clusters of the level, generic blocks included, that the global batch used."""
    touch_density: float
    """Touched blocks as a share of the level's clusters."""
    bytes: int
    """Bytes sent between ranks for the updates finished since the last step, and for their fetches."""
    stall_ms: float
    """Longest time that a rank waited for blocks."""
    fetch_ms: float
    """Longest time that a rank's worker took from addresses to blocks."""
    owner_ms: float
    """Longest time of the optimizer in the updates finished since the last step."""
    new_blocks: int
    """Touched blocks that no step of the run had touched before."""
    age_mean: float
    """Mean age of the other touched blocks: steps since the last step that touched, and so trained, them; 1 if that was
    the step before."""
    age_max: int
    """Largest age."""
    hits: dict[str, Any] | None = None
    """In sampled steps: how the tokens since the run began are spread over the level's clusters
    (`kmem.checkpoint.bank.hits.hit_figures`)."""
    write_norms: dict[str, float] | None = None
    """In sampled steps: mean and max, over the touched blocks, of the 2-norm of the parts that write (`down`, `b`,
    `values`) in all layers, after the step."""


class BankLedger:
    """Collects figures of the tables of all stages. Every rank of the world builds one.

    Args:
        tables: level -> table of this stage; none if its layers have no blocks.
        whole: layout of the model.
        stage: layout of this stage's layers.
    """

    def __init__(self, tables: Mapping[int, Table], whole: BankLayout, stage: BankLayout, mesh: Mesh) -> None:
        self.tables, self.layout, self.stage = dict(tables), whole, stage
        # All stages use the same clusters, so only one stage counts them.
        self.counted = bool(stage.layers) and stage.layers[0] == whole.layers[0]
        self.usage = BankUsage(whole, self.tables if self.counted else {}, self.counted and mesh.data_rank == 0)

    def close_step(self, step: BegunStep, sampled: bool) -> dict[int, LevelBank]:
        """Level -> figures of a step over all ranks. Collective over the world; all ranks pass the same `sampled`."""
        levels = self.layout.levels
        sums = torch.zeros(len(levels), len(_COUNTS) + 3, dtype=torch.float64)
        times = torch.zeros(len(levels), len(_TIMES) + 2, dtype=torch.float64)
        self.usage.count(step.micro_batches)
        for place, level in enumerate(levels):
            if level not in self.tables:
                continue
            table = self.tables[level]
            ticket, finished = step.tickets[table.spec.name], table.take_metrics()
            if self.counted:
                ages = self.usage.ages(level, ticket.owned_rows)
                counts = [getattr(ticket.metrics, name) for name in _COUNTS]
                sums[place, :-1] = torch.tensor([*counts, int((ages == 0).sum()), int(ages.sum())])
                times[place, -1] = int(ages.max()) if len(ages) else 0
            sums[place, -1] = sum(update.bytes for update in finished)
            milliseconds = [getattr(ticket.metrics, name) for name in _TIMES]
            times[place, :-1] = torch.tensor([*milliseconds, sum(update.owner_ms for update in finished)])
        sums, times = sums.to(local_device()), times.to(local_device())
        dist.all_reduce(sums)
        dist.all_reduce(times, op=dist.ReduceOp.MAX)
        hits = self.usage.whole_hits() if sampled else None
        norms = self._write_norms(step) if sampled else {}
        figures = {}
        for level, numbers, (stall, fetch, owner, oldest) in zip(levels, sums.tolist(), times.tolist(), strict=True):
            fetched, conflict, touched, new, total, sent = (int(number) for number in numbers)
            figures[level] = LevelBank(
                fetched_blocks=fetched,
                conflict_blocks=conflict,
                touched_blocks=touched,
                touch_density=touched / self.layout.rows(level),
                bytes=sent,
                stall_ms=stall,
                fetch_ms=fetch,
                owner_ms=owner,
                new_blocks=new,
                age_mean=total / max(1, touched - new),
                age_max=int(oldest),
                hits=None if hits is None else hit_figures(self.layout, hits, level),
                write_norms=norms.get(level),
            )
        return figures

    def _write_norms(self, step: BegunStep) -> dict[int, dict[str, float]]:
        """Level -> write norms of the blocks that the step touched. All blocks would cost a read of the whole bank."""
        levels = self.layout.levels
        squares = {level: torch.zeros(2, self.layout.rows(level), dtype=torch.float64) for level in levels}
        for level, table in self.tables.items():
            mine = step.tickets[table.spec.name].owned_rows
            rows = mine + table.local.start
            squares[level][0, rows] = table.squares(mine, written_columns(self.stage, level))
            squares[level][1, rows] = float(self.counted)
        whole = torch.cat([squares[level] for level in levels], dim=1).to(local_device())
        dist.all_reduce(whole)
        figures = {}
        parts = whole.cpu().split([self.layout.rows(level) for level in levels], dim=1)
        for level, part in zip(levels, parts, strict=True):
            norms = part[0, part[1] > 0].sqrt()
            if len(norms):
                figures[level] = {"mean": float(norms.mean()), "max": float(norms.max())}
        return figures
