"""Figures of the engram layers in a step, over all ranks: two small all-reduces, and two more in sampled steps."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from kmem.data.batch import SequenceBatch
from kmem.model.engram import HISTOGRAM_BINS, Engram, GateStatistics
from kmem.model.engram_reader import EngramAddresses, table_name
from kmem.model.shape import Shape
from kmem.parallel.memory_kind import BegunStep
from kmem.parallel.mesh import Mesh, local_device
from kmem.parallel.step_context import StepContext
from kmem.tables.table import Table

_COUNTS = ("addresses", "unique_rows", "conflict_rows", "owned_rows")
_TIMES = ("stall_ms", "fetch_ms")
NORM_SAMPLE = 2048
"""Number of rows whose norms are sampled, evenly spaced over a table."""


@dataclass(frozen=True)
class LayerEngram:
    """Figures of one layer's engram in one step."""

    addresses: int
    """Rows looked up by all tokens of the global batch."""
    unique_rows: int
    """Distinct rows that ranks asked for, summed over ranks."""
    conflict_rows: int
    """Requested rows that had to wait for the update of an earlier step."""
    touched_rows: int
    """Distinct rows of the table that the global batch looked up."""
    touch_density: float
    """Touched rows as a share of the table's rows."""
    bytes: int
    """Bytes sent between ranks for the updates finished since the last step, and for their fetches."""
    stall_ms: float
    """Longest time that a rank waited for rows."""
    fetch_ms: float
    """Longest time that a rank's worker took from ids to rows."""
    owner_ms: float
    """Longest time of a row optimizer in the updates finished since the last step."""
    gate_mean: list[float]
    """Mean gate by branch, over the step's tokens."""
    gate_histogram: list[list[int]]
    """By branch: number of tokens in equal bins of 0..1."""
    value_norm: float
    """Mean RMS of the values that the gates let through."""
    collision_rate: list[float] | None = None
    """By head: share of a rank's distinct n-grams that share their row with another n-gram; in sampled steps."""
    row_norms: dict[str, float] | None = None
    """Percentiles of row norms; in sampled steps."""

    @property
    def dedup_ratio(self) -> float:
        """Addresses per requested row."""
        return self.addresses / max(1, self.unique_rows)


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
        mesh: Mesh,
        context: StepContext,
    ) -> None:
        self.addresses = addresses
        self.mesh = mesh
        self.context = context
        self.layers = addresses.layers
        self.tables = {layer: tables[table_name(layer)] for layer in modules}
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

    def close_step(self, step: BegunStep, sampled: bool) -> dict[int, LayerEngram]:
        """Sum the step over all ranks and start the next one. Collective over the world; all ranks pass the same
        `sampled`."""
        sums = torch.zeros(len(self.layers), len(_COUNTS) + 1, dtype=torch.float64)
        times = torch.zeros(len(self.layers), len(_TIMES) + 1, dtype=torch.float64)
        for layer, table in self.tables.items():
            place, metrics = self.layers.index(layer), step.tickets[table.spec.name].metrics
            finished = table.take_metrics()
            sums[place] = torch.tensor(
                [*(getattr(metrics, name) for name in _COUNTS), sum(update.bytes for update in finished)]
            )
            times[place] = torch.tensor(
                [*(getattr(metrics, name) for name in _TIMES), sum(update.owner_ms for update in finished)]
            )
        sums, times = sums.to(local_device()), times.to(local_device())
        sums = torch.cat((sums, self._gates), dim=1)
        self._gates.zero_()
        dist.all_reduce(sums)
        dist.all_reduce(times, op=dist.ReduceOp.MAX)
        collisions = self._collisions(step.micro_batches) if sampled else [None] * len(self.layers)
        norms = self._norms() if sampled else [None] * len(self.layers)
        return {
            layer: self._figures(place, sums[place].tolist(), times[place].tolist(), collisions[place], norms[place])
            for place, layer in enumerate(self.layers)
        }

    def _figures(
        self,
        place: int,
        sums: list[float],
        times: list[float],
        collisions: list[float] | None,
        norms: dict[str, float] | None,
    ) -> LayerEngram:
        addresses, unique, conflict, touched, sent, passes, value_norm, *gates = sums
        histograms = np.array(gates[self.branches :], dtype=np.int64).reshape(self.branches, HISTOGRAM_BINS)
        return LayerEngram(
            addresses=int(addresses),
            unique_rows=int(unique),
            conflict_rows=int(conflict),
            touched_rows=int(touched),
            touch_density=touched / self.addresses.addressing.rows(place),
            bytes=int(sent),
            stall_ms=times[0],
            fetch_ms=times[1],
            owner_ms=times[2],
            gate_mean=[total / max(passes, 1) for total in gates[: self.branches]],
            gate_histogram=histograms.tolist(),
            value_norm=value_norm / max(passes, 1),
            collision_rate=collisions,
            row_norms=norms,
        )

    def _collisions(self, batches: list[SequenceBatch]) -> list[list[float] | None]:
        """Collision rates by table and head, over the n-grams of each rank."""
        addresses = self.addresses
        addressing = addresses.addressing
        counts = torch.zeros(len(self.layers), addressing.total_heads, 2, dtype=torch.float64)
        tokens, documents = (
            torch.cat([getattr(batch, name) for batch in batches]) for name in ("input_ids", "document_ids")
        )
        ids, homes = addresses.addressed(tokens).numpy(), documents.numpy()
        for layer in self.tables:
            place = self.layers.index(layer)
            rows = addressing.row_ids_numpy(place, ids, homes).reshape(-1, addressing.total_heads)
            grams = addressing.distinct_grams(ids, homes)
            for head in range(addressing.total_heads):
                count = grams[head // addressing.heads]
                counts[place, head] = torch.tensor([count, count - len(np.unique(rows[:, head]))])
        counts = counts.to(local_device())
        dist.all_reduce(counts)
        return (counts[..., 1] / counts[..., 0].clamp_min(1)).tolist()

    def _norms(self) -> list[dict[str, float] | None]:
        """By table: percentiles of the norms of a sample of rows."""
        norms = torch.zeros(len(self.layers), NORM_SAMPLE, dtype=torch.float64)
        for layer, table in self.tables.items():
            norms[self.layers.index(layer)] = table.row_norms(NORM_SAMPLE)
        norms = norms.to(local_device())
        dist.all_reduce(norms)
        shares = {"p1": 0.01, "p50": 0.5, "p99": 0.99, "max": 1.0}
        return [{name: float(torch.quantile(row, share)) for name, share in shares.items()} for row in norms]
