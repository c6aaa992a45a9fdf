"""The tables of a memory bank in the pipeline: one per level and stage, whose rows hold, for every cluster, the blocks
of this stage's layers."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from kmem.checkpoint.bank.rows import held_rows
from kmem.checkpoint.pieces import Pieces
from kmem.config import Config, RowOptimizerConfig, TableConfig
from kmem.data.batch import SequenceBatch
from kmem.model.bank_layout import BankLayout, bank_table_name, layer_bank_name
from kmem.parallel.bank_step import step_rows
from kmem.parallel.stage_tables import mapped_folder
from kmem.tables.sharding import RowSelection
from kmem.tables.table import Table
from kmem.tables.table_spec import TableSpec


def stage_table_name(layout: BankLayout, level: int) -> str:
    """Name of a stage's table of a level, different for all stages.

    Args:
        layout: of this stage's layers.
    """
    return f"{bank_table_name(level)}.layers-{layout.layers[0]}-{layout.layers[-1]}"


class BankTable:
    """The table of a level.

    Args:
        layout: of this stage's layers, of which at least one has blocks.
        norm_group: the ranks of all stages that have blocks, over which the norm of a level's gradient is summed; None
            where these are the stage's own.
    """

    section = "bank"

    def __init__(
        self, config: Config, layout: BankLayout, level: int, norm_group: dist.ProcessGroup | None = None
    ) -> None:
        self.settings: TableConfig = config.bank
        self.optimizer: RowOptimizerConfig | None = config.bank.optimizer
        self.layout, self.level, self.norm_group = layout, level, norm_group
        self.selection = RowSelection(layout.rows(level), tuple(held_rows(config, layout, level)))

    def spec(self, config: Config) -> TableSpec:
        bank, layout, seed, selection = self.settings, self.layout, config.train.init_seed, self.selection

        def initial_rows(start: int, stop: int) -> Tensor:
            held = [rows for _, rows in selection.cut(start, stop)]
            return torch.cat([layout.initial_rows(seed, self.level, rows.start, rows.stop) for rows in held])

        return TableSpec(
            stage_table_name(layout, self.level),
            len(selection),
            layout.row_values(self.level),
            bank.dtype,
            bank.store,
            mapped_folder(config, bank, self.section) if bank.store == "mmap" else None,
            seed,
            initial_rows=initial_rows,
            selection=selection,
        )

    def ids(self, batches: Sequence[SequenceBatch]) -> Tensor:
        """The distinct rows of all micro-batches, [1, 1, 1, U]; `step_blocks` has who uses which."""
        return self.selection.places(step_rows(self.layout, self.level, batches)).view(1, 1, 1, -1)

    def pieces(self, table: Table) -> dict[str, dict[str, Pieces]]:
        """By layer: columns of the rows and of their moments. What a row has one number of is the same for all layers,
        and stands with each."""
        width, arrays = self.layout.block_values(self.level), table.arrays()
        found = {}
        for place, layer in enumerate(self.layout.layers):
            columns = {name: slice(place * width, (place + 1) * width) for name, wide in arrays.items() if wide > 1}
            found[layer_bank_name(layer, self.level)] = table.pieces(columns)
        return found
