"""What the tables of a memory bank did in a step, over all ranks: two small all-reduces."""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from kmem.memory.table import Table
from kmem.model.bank_layout import BankLayout
from kmem.parallel.bank_table import stage_table_name
from kmem.parallel.mesh import local_device
from kmem.parallel.stage_memory import BegunStep, StageMemory

_COUNTS = ("unique_rows", "conflict_rows", "owned_rows")
_TIMES = ("stall_ms", "fetch_ms")


@dataclass(frozen=True)
class LevelBank:
    """A level of the bank in one step."""

    fetched_blocks: int
    """Distinct clusters whose blocks ranks asked for, summed over the data-parallel ranks."""
    conflict_blocks: int
    """Of these, clusters that had to wait for the update of an earlier step."""
    touched_blocks: int
    """Distinct clusters of the level, generic blocks included, that the global batch used."""
    touch_density: float
    """Share of the level's clusters that they are."""
    bytes: int
    """Sent between ranks for the updates finished since the last step, with the fetches that belong to them."""
    stall_ms: float
    """Longest time that a rank waited for blocks."""
    fetch_ms: float
    """Longest time that a rank's worker was on its way from addresses to blocks."""
    owner_ms: float
    """Longest time of the optimizer, of the updates finished since the last step."""


class BankLedger:
    """Collects what the tables of all stages do. Every rank of the world builds one.

    Args:
        whole: layout of the model.
        stage: of this stage's layers; None where they have no blocks.
    """

    def __init__(self, memory: StageMemory, whole: BankLayout, stage: BankLayout | None) -> None:
        self.layout = whole
        self.tables: dict[int, Table] = {}
        if stage is not None:
            self.tables = {level: memory.tables[stage_table_name(stage, level)] for level in stage.levels}
        # Every stage uses the same clusters: one of them counts.
        self.counted = stage is not None and stage.layers[0] == whole.layers[0]

    def close_step(self, step: BegunStep) -> dict[int, LevelBank]:
        """Sum a step over all ranks, by level; collective over the world."""
        levels = self.layout.levels
        sums = torch.zeros(len(levels), len(_COUNTS) + 1, dtype=torch.float64)
        times = torch.zeros(len(levels), len(_TIMES) + 1, dtype=torch.float64)
        for place, level in enumerate(levels):
            if level not in self.tables:
                continue
            table = self.tables[level]
            metrics, finished = step.tickets[table.spec.name].metrics, table.take_metrics()
            if self.counted:
                sums[place, :-1] = torch.tensor([getattr(metrics, name) for name in _COUNTS])
            sums[place, -1] = sum(update.bytes for update in finished)
            times[place, :-1] = torch.tensor([getattr(metrics, name) for name in _TIMES])
            times[place, -1] = sum(update.owner_ms for update in finished)
        sums, times = sums.to(local_device()), times.to(local_device())
        dist.all_reduce(sums)
        dist.all_reduce(times, op=dist.ReduceOp.MAX)
        found = {}
        for level, counts, milliseconds in zip(levels, sums.tolist(), times.tolist(), strict=True):
            fetched, conflict, touched, sent = (int(count) for count in counts)
            density = touched / self.layout.rows(level)
            found[level] = LevelBank(fetched, conflict, touched, density, sent, *milliseconds)
        return found
