"""The table of one layer's n-gram memory in the pipeline."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kmem.config import Config
from kmem.data.batch import SequenceBatch
from kmem.memory.table import TableSpec
from kmem.model.engram_memory import EngramAddresses, table_name
from kmem.parallel.stage_memory import mapped_folder


class NgramTable:
    """The table of a layer: its rows are those of the n-grams that end at each token.

    Args:
        addresses: of the model.
    """

    def __init__(self, config: Config, addresses: EngramAddresses, layer: int) -> None:
        self.settings = config.memory
        self.addresses, self.layer = addresses, layer

    def spec(self, config: Config) -> TableSpec:
        engram, memory = config.model.engram, self.settings
        assert engram is not None
        assert engram.row_dim is not None
        addressing = self.addresses.addressing
        return TableSpec(
            table_name(self.layer),
            addressing.padded_rows(addressing.layers.index(self.layer)),
            engram.row_dim,
            memory.dtype,
            memory.store,
            mapped_folder(config) if memory.store == "mmap" else None,
            config.train.init_seed,
            engram.init_std,
        )

    def ids(self, batches: Sequence[SequenceBatch]) -> Tensor:
        tokens, documents = (
            torch.cat([getattr(batch, name) for batch in batches]) for name in ("input_ids", "document_ids")
        )
        return self.addresses.row_ids(self.layer, tokens, documents).unflatten(0, (len(batches), -1))
