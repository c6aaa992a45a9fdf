"""Memories in training whose rows are read by token ids: one table per layer, fetched ahead of the step."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kmem.config import Config
from kmem.data.batch import SequenceBatch
from kmem.model.memory_kind import MemoryModule
from kmem.model.token_rows import TokenAddresses, TokenRows, TokenRowsKind
from kmem.parallel.kind_table import KindTable
from kmem.parallel.memory_kind import BegunStep, MemoryKind, MemoryPlan, StageMemory, StageParts
from kmem.parallel.mesh import Mesh
from kmem.parallel.table_bytes import TableBytes
from kmem.parallel.table_figures import row_norms, table_figures
from kmem.tables.table import Table
from kmem.tables.working_set import StepPlan

if TYPE_CHECKING:
    from kmem.parallel.step_context import StepContext


class TokenRowsTraining(MemoryKind):
    """A kind whose tables follow from `ModelKind.tables`. Its `prepare` gives the `TokenAddresses`."""

    model: TokenRowsKind
    restarts_backbone_optimizer = True

    def prepare(self, config: Config, tokenizer: Path) -> TokenAddresses:
        return self.model.addresses(config.model.shape)

    def stage(self, parts: StageParts, prepared: Any) -> "StageTokenRows":
        return StageTokenRows(self, parts, prepared)

    def imagined_read(self, config: Config, layer: int) -> Any:
        shape, size = config.model.shape, (config.train.micro_batch_size, config.data.sequence_length)
        (width,) = (table.width for table in self.model.tables(shape).values() if table.layer == layer)
        values = self.model.row_values(shape, layer)
        rows = torch.empty(*size, values // width, width).requires_grad_()
        return TokenRows(rows, document_ids=torch.empty(size, dtype=torch.int64))

    def table_bytes(self, config: Config, mesh: Mesh, layers: Sequence[int]) -> list[TableBytes]:
        shape = config.model.shape
        tokens = config.train.global_batch_size // mesh.data * config.data.sequence_length
        return [
            TableBytes.of(
                self.name, "layer", table.layer, self.settings(config), self.optimizer(config), mesh, table.rows,
                table.width, look_ups, look_ups,
            )
            for table in self.model.tables(shape).values()
            if table.layer in layers
            for look_ups in [tokens * self.model.row_values(shape, table.layer) // table.width]
        ]  # fmt: skip


class StageTokenRows(StageMemory):
    """The layers of a stage that have the memory."""

    def __init__(self, kind: TokenRowsTraining, parts: StageParts, addresses: TokenAddresses) -> None:
        self.kind = kind.name
        self.modules: dict[int, MemoryModule] = dict(sorted(parts.modules.get(kind.name, {}).items()))
        self.layers = list(self.modules)
        self.addresses = addresses
        shape = parts.shape
        self._own_rows = kind.model.trained_control(shape)
        self._all = kind.model.tables(shape)
        self._names = {table.layer: name for name, table in self._all.items()}
        self.tables = [KindTable(kind, parts.config, self._names[layer]) for layer in self.layers]
        self._tables: dict[str, Table] = {}

    def start(self, tables: Mapping[str, Table]) -> None:
        self._tables = dict(tables)

    def plan(self, micro_batches: Sequence[SequenceBatch], control: str | None = None) -> MemoryPlan:
        tokens, documents = (
            torch.cat([getattr(batch, name) for batch in micro_batches]) for name in ("input_ids", "document_ids")
        )
        plans = {}
        for layer in self.layers:
            rows = self.addresses.row_ids(layer, tokens, documents)
            if control not in (None, self._own_rows):
                rows = self.addresses.other_rows(layer, control)(rows)
            plans[self._names[layer]] = StepPlan.of(rows.unflatten(0, (len(micro_batches), -1)))
        return MemoryPlan(plans)

    def read(self, layer: int, context: "StepContext") -> Any:
        rows = context.working_sets[self._names[layer]].lookup(context.running)
        return TokenRows(rows, document_ids=context.micro_batch().sequences.document_ids)

    def close_step(self, step: BegunStep, sampled: bool) -> dict[str, dict[str, Any]]:
        """Layer -> figures of `table_figures`; in sampled steps also `row_norms`."""
        names = list(self._names.values())
        tables = [self._tables.get(name) for name in names]
        figures, _, _ = table_figures(tables, step, [self._all[name].rows for name in names])
        if sampled:
            figures = [known | {"row_norms": norms} for known, norms in zip(figures, row_norms(tables), strict=True)]
        return {str(layer): known for layer, known in zip(self._names, figures, strict=True)}
