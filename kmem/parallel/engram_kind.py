"""Engram in training: rows of n-grams, with figures of gates and collisions."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from kmem.checkpoint.manifest import check_addressing
from kmem.checkpoint.pieces import CheckpointError
from kmem.config import Config
from kmem.data.batch import SequenceBatch
from kmem.data.engram_addresses import model_addresses
from kmem.model.engram import HISTOGRAM_BINS, Engram, EngramInput, GateStatistics
from kmem.model.engram_kind import EngramKind
from kmem.model.engram_reader import EngramAddresses, table_name
from kmem.parallel.memory_kind import BegunStep, StageParts
from kmem.parallel.mesh import local_device
from kmem.parallel.table_figures import row_norms, table_figures
from kmem.parallel.token_rows import StageTokenRows, TokenRowsTraining

if TYPE_CHECKING:
    from kmem.parallel.step_context import StepContext


class EngramTraining(TokenRowsTraining):
    """The addresses depend on the tokenizer."""

    model = EngramKind()

    def prepare(self, config: Config, tokenizer: Path) -> EngramAddresses:
        addresses = model_addresses(config.model, tokenizer)
        assert addresses is not None
        return addresses

    def manifest(self, prepared: EngramAddresses) -> dict[str, Any]:
        return prepared.addressing.to_manifest()

    def stage(self, parts: StageParts, prepared: EngramAddresses) -> "StageEngram":
        return StageEngram(parts, prepared)

    def check_added(self, config: Config, folder: Path) -> None:
        assert config.model.engram is not None
        if config.model.engram.init_std:
            raise CheckpointError(
                f"model.engram.init_std: {config.model.engram.init_std}, but {folder} has no engram; set it to 0, so "
                "that the added rows change nothing at first"
            )

    def check_manifest(self, folder: Path, stored: dict[str, Any], prepared: EngramAddresses, hint: str) -> None:
        check_addressing(folder, stored, prepared, hint)

    def imagined_read(self, config: Config, layer: int) -> EngramInput:
        read = super().imagined_read(config, layer)
        return EngramInput(read.rows.flatten(-2), document_ids=read.document_ids)


class StageEngram(StageTokenRows):
    """The engram layers of a stage. Figures of a step take two small all-reduces, and two more in sampled steps."""

    addresses: EngramAddresses

    def __init__(self, parts: StageParts, addresses: EngramAddresses) -> None:
        super().__init__(KIND, parts, addresses)
        self._branches, self._context = parts.shape.branches, parts.context
        # On the device: reading a gate on the host would wait for every layer of every micro-batch.
        self._gates = torch.zeros(
            len(addresses.layers), 2 + self._branches * (1 + HISTOGRAM_BINS), dtype=torch.float64, device=local_device()
        )
        for layer, module in self.modules.items():
            assert isinstance(module, Engram)
            module.on_gate = partial(self._record, addresses.layers.index(layer))

    def _record(self, place: int, statistics: GateStatistics) -> None:
        if not self._context.recording:  # an evaluation
            return
        row = self._gates[place]
        row[0] += 1
        row[1] += statistics.value_norm
        row[2 : 2 + self._branches] += statistics.mean_M
        row[2 + self._branches :] += statistics.histogram.flatten()

    def read(self, layer: int, context: "StepContext") -> EngramInput:
        looked_up = super().read(layer, context)
        return EngramInput(looked_up.rows.flatten(-2), document_ids=looked_up.document_ids)

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
        layers = self.addresses.layers
        tables = [self._tables.get(table_name(layer)) for layer in layers]
        rows = [self.addresses.addressing.rows(place) for place in range(len(layers))]
        counted, gates, _ = table_figures(tables, step, rows, self._gates)
        self._gates.zero_()
        figures = {}
        for layer, known, (passes, value_norm, *branches) in zip(layers, counted, gates.tolist(), strict=True):
            histograms = np.array(branches[self._branches :], dtype=np.int64).reshape(self._branches, HISTOGRAM_BINS)
            figures[str(layer)] = known | {
                "dedup_ratio": known["addresses"] / max(1, known["unique_rows"]),
                "gate_mean": [total / max(passes, 1) for total in branches[: self._branches]],
                "gate_histogram": histograms.tolist(),
                "value_norm": value_norm / max(passes, 1),
                "collision_rate": None,
                "row_norms": None,
            }
        if sampled:
            for known, collisions, norms in zip(
                figures.values(), self._collisions(step.micro_batches), row_norms(tables), strict=True
            ):
                known |= {"collision_rate": collisions, "row_norms": norms}
        return figures

    def _collisions(self, batches: Sequence[SequenceBatch]) -> list[list[float]]:
        """Collision rates by table and head, over the n-grams of each rank."""
        addresses, addressing = self.addresses, self.addresses.addressing
        counts = torch.zeros(len(addresses.layers), addressing.total_heads, 2, dtype=torch.float64)
        tokens, documents = (
            torch.cat([getattr(batch, name) for batch in batches]) for name in ("input_ids", "document_ids")
        )
        ids, homes = addresses.addressed(tokens).numpy(), documents.numpy()
        for place in map(addresses.layers.index, self.layers):
            rows = addressing.row_ids_numpy(place, ids, homes).reshape(-1, addressing.total_heads)
            grams = addressing.distinct_grams(ids, homes)
            for head in range(addressing.total_heads):
                count = grams[head // addressing.heads]
                counts[place, head] = torch.tensor([count, count - len(np.unique(rows[:, head]))])
        counts = counts.to(local_device())
        dist.all_reduce(counts)
        return (counts[..., 1] / counts[..., 0].clamp_min(1)).tolist()


KIND = EngramTraining()
