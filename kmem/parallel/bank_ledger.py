"""Figures of a bank's tables in a step, over all ranks. They take two small all-reduces; sampled steps add two more, of
one number per leaf and of two numbers per row."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from kmem.checkpoint.bank.hits import hit_figures
from kmem.model.bank_layout import BankLayout
from kmem.parallel.bank_usage import BankUsage, written_columns
from kmem.parallel.memory_kind import BegunStep
from kmem.parallel.mesh import Mesh, local_device
from kmem.parallel.table_figures import TIMES, table_figures
from kmem.tables.table import Table


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

    def close_step(self, step: BegunStep, sampled: bool) -> dict[str, dict[str, Any]]:
        """Level -> figures of a step over all ranks. A block is a row of a cluster. `touch_density`, `bytes`,
        `stall_ms`, `fetch_ms` and `owner_ms` as in `table_figures`, and

            fetched_blocks    distinct clusters whose blocks ranks asked for, summed over the data-parallel ranks
            conflict_blocks   fetched clusters that had to wait for the update of an earlier step
            touched_blocks    distinct clusters of the level, generic blocks included, that the global batch used
            new_blocks        touched blocks that no step of the run had touched before
            age_mean          mean age of the other touched blocks: steps since the last step that touched, and so
                              trained, them; 1 if that was the step before
            age_max           largest age
            hits              in sampled steps: how the tokens since the run began are spread over the level's clusters
                              (`kmem.checkpoint.bank.hits.hit_figures`)
            write_norms       in sampled steps: mean and max, over the touched blocks, of the 2-norm of the parts that
                              write (`down`, `b`, `values`) in all layers, after the step

        Collective over the world; all ranks pass the same `sampled`.
        """
        levels = self.layout.levels
        tables = [self.tables.get(level) for level in levels]
        sums, oldest = (
            torch.zeros(len(levels), 2, dtype=torch.float64),
            torch.zeros(len(levels), 1, dtype=torch.float64),
        )
        self.usage.count(step.micro_batches)
        for place, (level, table) in enumerate(zip(levels, tables, strict=True)):
            if table is not None and self.counted:
                ages = self.usage.ages(level, step.tickets[table.spec.name].owned_rows)
                sums[place] = torch.tensor([int((ages == 0).sum()), int(ages.sum())])
                oldest[place] = int(ages.max()) if len(ages) else 0
        rows = [self.layout.rows(level) for level in levels]
        counted, sums, oldest = table_figures(tables, step, rows, sums, oldest, self.counted)
        hits = self.usage.whole_hits() if sampled else None
        norms = self._write_norms(step) if sampled else {}
        figures = {}
        for level, known, (new, total), (age,) in zip(levels, counted, sums.tolist(), oldest.tolist(), strict=True):
            figures[str(level)] = {
                "fetched_blocks": known["unique_rows"],
                "conflict_blocks": known["conflict_rows"],
                "touched_blocks": known["touched_rows"],
                **{name: known[name] for name in ("touch_density", "bytes", *TIMES, "owner_ms")},
                "new_blocks": int(new),
                "age_mean": total / max(1, known["touched_rows"] - new),
                "age_max": int(age),
                "hits": None if hits is None else hit_figures(self.layout, hits, level),
                "write_norms": norms.get(level),
            }
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
