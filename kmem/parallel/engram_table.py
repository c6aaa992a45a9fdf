"""The table of one layer's n-gram memory in the pipeline."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from kmem.checkpoint.pieces import Pieces
from kmem.config import Config, RowOptimizerConfig, TableConfig
from kmem.data.batch import SequenceBatch
from kmem.model.engram_reader import EngramAddresses, table_name
from kmem.parallel.stage_tables import mapped_folder
from kmem.tables.table import Table
from kmem.tables.table_spec import TableSpec


class EngramTable:
    """The table of a layer: its rows are those of the n-grams that end at each token.

    Args:
        addresses: of the model.
    """

    section = "engram"

    def __init__(self, config: Config, addresses: EngramAddresses, layer: int) -> None:
        self.settings: TableConfig = config.engram
        self.optimizer: RowOptimizerConfig | None = None if config.model.frozen_anchor else config.engram.optimizer
        self.norm_group: dist.ProcessGroup | None = None
        self.addresses, self.layer = addresses, layer

    def spec(self, config: Config) -> TableSpec:
        engram, settings = config.model.engram, self.settings
        assert engram is not None
        assert engram.row_dim is not None
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

    def ids(self, batches: Sequence[SequenceBatch]) -> Tensor:
        tokens, documents = (
            torch.cat([getattr(batch, name) for batch in batches]) for name in ("input_ids", "document_ids")
        )
        return self.addresses.row_ids(self.layer, tokens, documents).unflatten(0, (len(batches), -1))

    def pieces(self, table: Table) -> dict[str, dict[str, Pieces]]:
        return {table.spec.name: table.pieces()}
