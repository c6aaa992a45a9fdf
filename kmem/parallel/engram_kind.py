"""Engram in training: rows of n-grams, with figures of gates and collisions."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kmem.checkpoint.manifest import check_addressing
from kmem.checkpoint.pieces import CheckpointError
from kmem.config import Config
from kmem.data.engram_addresses import model_addresses
from kmem.model.engram import Engram, EngramInput
from kmem.model.engram_kind import EngramKind
from kmem.model.engram_reader import EngramAddresses
from kmem.parallel.engram_ledger import EngramLedger
from kmem.parallel.memory_kind import BegunStep, StageParts
from kmem.parallel.token_rows import StageTokenRows, TokenRowsTraining
from kmem.tables.table import Table

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

    def activation_values(self, config: Config, layer: int) -> int:
        shape, wide = config.model.shape, config.train.precision == "fp32"
        stream = shape.branches * shape.hidden_size
        values = 2 * stream + shape.hidden_size + self.model.row_values(shape, layer)
        return values + ((5 if wide else 12) * stream if shape.engram.conv_kernel else 0)


class StageEngram(StageTokenRows):
    """The engram layers of a stage."""

    addresses: EngramAddresses

    def __init__(self, parts: StageParts, addresses: EngramAddresses) -> None:
        super().__init__(KIND, parts, addresses)
        self._shape, self._context = parts.shape, parts.context

    def start(self, tables: Mapping[str, Table]) -> None:
        modules = {layer: module for layer, module in self.modules.items() if isinstance(module, Engram)}
        self.ledger = EngramLedger(tables, self.addresses, modules, self._shape, self._context)

    def read(self, layer: int, context: "StepContext") -> EngramInput:
        looked_up = super().read(layer, context)
        return EngramInput(looked_up.rows.flatten(-2), document_ids=looked_up.document_ids)

    def close_step(self, step: BegunStep, sampled: bool) -> dict[str, dict[str, Any]]:
        return self.ledger.close_step(step, sampled)


KIND = EngramTraining()
