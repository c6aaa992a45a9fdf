"""Figures of the engram layers in a step, over all ranks: two small all-reduces, and two more in sampled steps."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from kmem.data.batch import SequenceBatch
from kmem.model.engram import HISTOGRAM_BINS, Engram, GateStatistics
from kmem.model.engram_reader import EngramAddresses, table_name
from kmem.model.shape import Shape
from kmem.parallel.memory_kind import BegunStep
from kmem.parallel.mesh import local_device
from kmem.parallel.step_context import StepContext
from kmem.parallel.table_figures import row_norms, table_figures
from kmem.tables.table import Table


class EngramLedger:
    """Collects figures of the engram layers of this stage.

    Args:
        modules: layer -> engram module of this stage.
    """

    def __init__(
        self,
        tables: Mapping[str, Table],
        addresses: EngramAddresses,
        modules: Mapping[int, Engram],
        shape: Shape,
        context: StepContext,
    ) -> None:
        self.addresses = addresses
        self.context = context
        self.layers = addresses.layers
        self.tables = [tables.get(table_name(layer)) for layer in self.layers]
        self.branches = shape.branches
        # On the device: reading a gate on the host would wait for every layer of every micro-batch.
        self._gates = torch.zeros(
            len(self.layers), 2 + self.branches * (1 + HISTOGRAM_BINS), dtype=torch.float64, device=local_device()
        )
        for layer, module in modules.items():
            module.on_gate = self._recorder(self.layers.index(layer))

    def _recorder(self, place: int):
        def record(statistics: GateStatistics) -> None:
            if not self.context.recording:  # an evaluation
                return
            row = self._gates[place]
            row[0] += 1
            row[1] += statistics.value_norm
            row[2 : 2 + self.branches] += statistics.mean_M
            row[2 + self.branches :] += statistics.histogram.flatten()

        return record

    def close_step(self, step: BegunStep, sampled: bool) -> dict[str, dict[str, Any]]:
        """Layer -> figures of the step over all ranks: those of `table_figures` and

            dedup_ratio      addresses per requested row
            gate_mean        by branch, mean gate over the step's tokens
            gate_histogram   by branch, number of tokens in equal bins of 0..1
            value_norm       mean RMS of the values that the gates let through
            collision_rate   in sampled steps, by head: share of a rank's distinct n-grams that share their row with
                             another n-gram
            row_norms        in sampled steps: percentiles of row norms

        Starts the next step. Collective over the world; all ranks pass the same `sampled`.
        """
        rows = [self.addresses.addressing.rows(place) for place in range(len(self.layers))]
        counted, gates, _ = table_figures(self.tables, step, rows, self._gates)
        self._gates.zero_()
        figures = {}
        for layer, known, (passes, value_norm, *branches) in zip(self.layers, counted, gates.tolist(), strict=True):
            histograms = np.array(branches[self.branches :], dtype=np.int64).reshape(self.branches, HISTOGRAM_BINS)
            figures[str(layer)] = known | {
                "dedup_ratio": known["addresses"] / max(1, known["unique_rows"]),
                "gate_mean": [total / max(passes, 1) for total in branches[: self.branches]],
                "gate_histogram": histograms.tolist(),
                "value_norm": value_norm / max(passes, 1),
                "collision_rate": None,
                "row_norms": None,
            }
        if sampled:
            for known, collisions, norms in zip(
                figures.values(), self._collisions(step.micro_batches), row_norms(self.tables), strict=True
            ):
                known |= {"collision_rate": collisions, "row_norms": norms}
        return figures

    def _collisions(self, batches: list[SequenceBatch]) -> list[list[float]]:
        """Collision rates by table and head, over the n-grams of each rank."""
        addresses = self.addresses
        addressing = addresses.addressing
        counts = torch.zeros(len(self.layers), addressing.total_heads, 2, dtype=torch.float64)
        tokens, documents = (
            torch.cat([getattr(batch, name) for batch in batches]) for name in ("input_ids", "document_ids")
        )
        ids, homes = addresses.addressed(tokens).numpy(), documents.numpy()
        for place, table in enumerate(self.tables):
            if table is None:
                continue
            rows = addressing.row_ids_numpy(place, ids, homes).reshape(-1, addressing.total_heads)
            grams = addressing.distinct_grams(ids, homes)
            for head in range(addressing.total_heads):
                count = grams[head // addressing.heads]
                counts[place, head] = torch.tensor([count, count - len(np.unique(rows[:, head]))])
        counts = counts.to(local_device())
        dist.all_reduce(counts)
        return (counts[..., 1] / counts[..., 0].clamp_min(1)).tolist()
