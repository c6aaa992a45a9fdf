"""Engram in training: one table per layer. The token ids of a step determine the rows that it reads."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from kmem.checkpoint.manifest import check_addressing
from kmem.checkpoint.pieces import CheckpointError, Pieces
from kmem.config import Config, RowOptimizerConfig, TableConfig
from kmem.data.batch import SequenceBatch
from kmem.data.engram_addresses import model_addresses
from kmem.model.engram import Engram, EngramInput
from kmem.model.engram_kind import EngramKind
from kmem.model.engram_reader import EngramAddresses, other_rows, table_name, table_rows
from kmem.parallel.engram_ledger import EngramLedger
from kmem.parallel.memory_kind import BegunStep, MemoryKind, MemoryPlan, StageMemory, StageParts
from kmem.parallel.mesh import Mesh
from kmem.parallel.stage_tables import mapped_folder
from kmem.parallel.table_bytes import TableBytes
from kmem.tables.table import Table
from kmem.tables.table_spec import TableSpec
from kmem.tables.working_set import StepPlan

if TYPE_CHECKING:
    from kmem.parallel.step_context import StepContext


class EngramTraining(MemoryKind):
    """Rows of n-grams are fetched ahead of the step that reads them."""

    model = EngramKind()
    restarts_backbone_optimizer = True

    def prepare(self, config: Config, tokenizer: Path) -> EngramAddresses:
        addresses = model_addresses(config.model, tokenizer)
        assert addresses is not None
        return addresses

    def manifest(self, prepared: EngramAddresses) -> dict[str, Any]:
        return prepared.addressing.to_manifest()

    def stage(self, parts: StageParts, prepared: EngramAddresses) -> "StageEngram":
        return StageEngram(parts, prepared)

    def optimizer(self, config: Config) -> RowOptimizerConfig | None:
        return None if config.model.frozen_anchor else config.engram.optimizer

    def check_added(self, config: Config, folder: Path) -> None:
        assert config.model.engram is not None
        if config.model.engram.init_std:
            raise CheckpointError(
                f"model.engram.init_std: {config.model.engram.init_std}, but {folder} has no engram; set it to 0, so "
                "that the added rows change nothing at first"
            )

    def check_manifest(self, folder: Path, stored: dict[str, Any], prepared: EngramAddresses, hint: str) -> None:
        check_addressing(folder, stored, prepared, hint)

    def table_bytes(self, config: Config, mesh: Mesh, layers: Sequence[int]) -> list[TableBytes]:
        shape = config.model.shape
        tokens = config.train.global_batch_size // mesh.data * config.data.sequence_length
        look_ups = tokens * len(shape.engram.orders) * shape.engram.heads
        return [
            TableBytes.of(
                self.name, "layer", layer, config.engram, self.optimizer(config), mesh, rows, shape.engram.row_dim,
                look_ups, look_ups,
            )
            for layer, rows in table_rows(shape).items()
            if layer in layers
        ]  # fmt: skip

    def activation_values(self, config: Config, layer: int) -> int:
        shape, wide = config.model.shape, config.train.precision == "fp32"
        stream = shape.branches * shape.hidden_size
        values = 2 * stream + shape.hidden_size + self.model.row_values(shape, layer)
        return values + ((5 if wide else 12) * stream if shape.engram.conv_kernel else 0)


class StageEngram(StageMemory):
    """The engram layers of a stage."""

    kind = EngramKind.name

    def __init__(self, parts: StageParts, addresses: EngramAddresses) -> None:
        modules = parts.modules.get(self.kind, {})
        self.modules: dict[int, Engram] = {
            layer: module for layer, module in modules.items() if isinstance(module, Engram)
        }
        self.layers = sorted(self.modules)
        self.addresses = addresses
        self.tables = [EngramTable(parts.config, addresses, layer) for layer in self.layers]
        self._parts = parts

    def start(self, tables: Mapping[str, Table]) -> None:
        shape, mesh, context = self._parts.shape, self._parts.mesh, self._parts.context
        self.ledger = EngramLedger(tables, self.addresses, self.modules, shape, mesh, context)

    def plan(self, micro_batches: Sequence[SequenceBatch], control: str | None = None) -> MemoryPlan:
        tokens, documents = (
            torch.cat([getattr(batch, name) for batch in micro_batches]) for name in ("input_ids", "document_ids")
        )
        plans = {}
        for layer in self.layers:
            rows = self.addresses.row_ids(layer, tokens, documents)
            if control is not None:
                rows = other_rows(self.addresses.addressing, self.addresses.layers.index(layer), control)(rows)
            plans[table_name(layer)] = StepPlan.of(rows.unflatten(0, (len(micro_batches), -1)))
        return MemoryPlan(plans)

    def read(self, layer: int, context: "StepContext") -> EngramInput:
        rows = context.working_sets[table_name(layer)].lookup(context.running).flatten(-2)
        return EngramInput(rows, document_ids=context.micro_batch().sequences.document_ids)

    def close_step(self, step: BegunStep, sampled: bool) -> dict[str, dict[str, Any]]:
        return {
            str(layer): {**asdict(figures), "dedup_ratio": figures.dedup_ratio}
            for layer, figures in self.ledger.close_step(step, sampled).items()
        }


class EngramTable:
    """The table of a layer."""

    section = EngramKind.name

    def __init__(self, config: Config, addresses: EngramAddresses, layer: int) -> None:
        self.settings: TableConfig = config.engram
        self.optimizer: RowOptimizerConfig | None = KIND.optimizer(config)
        self.norm_group: dist.ProcessGroup | None = None
        self.addresses, self.layer = addresses, layer

    def spec(self, config: Config) -> TableSpec:
        engram, settings = config.model.shape.engram, self.settings
        addressing = self.addresses.addressing
        return TableSpec(
            table_name(self.layer),
            addressing.padded_rows(addressing.layers.index(self.layer)),
            engram.row_dim,
            settings.dtype,
            settings.store,
            mapped_folder(config, settings, self.section) if settings.store == "mmap" else None,
            config.train.init_seed,
            engram.init_std,
        )

    def pieces(self, table: Table) -> dict[str, dict[str, Pieces]]:
        return {table.spec.name: table.pieces()}


KIND = EngramTraining()
