"""The engram of a checkpoint for use in one process: its addressing is checked, its rows stay in the files."""

from pathlib import Path
from typing import Any, Protocol

from kmem.checkpoint.manifest import check_addressing
from kmem.checkpoint.pieces import CheckpointError
from kmem.checkpoint.reader import CheckpointReader
from kmem.config import Config
from kmem.data.engram_addresses import model_addresses
from kmem.model.decoder import Decoder
from kmem.model.engram import Engram
from kmem.model.engram_reader import EngramAddresses, EngramReader, table_name
from kmem.model.mapped_rows import MappedRows


class Addressed(Protocol):
    """The part of `CheckpointReader` that describes an engram's addressing."""

    @property
    def config(self) -> Config: ...

    @property
    def folder(self) -> Path: ...

    @property
    def addressing(self) -> dict[str, Any] | None: ...

    @property
    def tokenizer_path(self) -> Path: ...


def checkpoint_addresses(reader: Addressed) -> EngramAddresses | None:
    """The addresses that a checkpoint's tables were trained with; None for a model without engram.

    Raises:
        CheckpointError: it holds no addressing, or its tokenizer now gives a different one.
    """
    if reader.config.model.engram is None:
        return None
    if reader.addressing is None:
        raise CheckpointError(f"{reader.folder}: has no addressing of model.engram, so its rows cannot be found")
    if not reader.tokenizer_path.is_dir():
        raise CheckpointError(
            f"{reader.tokenizer_path}: no tokenizer here, and rows are addressed by its ids; copy the data's"
        )
    addresses = model_addresses(reader.config.model, reader.tokenizer_path)
    assert addresses is not None
    check_addressing(reader.folder, reader.addressing, addresses)
    return addresses


def mapped_tables(reader: CheckpointReader, addresses: EngramAddresses) -> dict[int, MappedRows]:
    """Layer -> its rows, fetched from the checkpoint's mapped files."""
    return {layer: reader.map_rows(table_name(layer)) for layer in addresses.layers}


def checkpoint_engram(reader: CheckpointReader, decoder: Decoder) -> EngramReader:
    """The engram of a checkpoint whose model has one, for the modules of `decoder`.

    Raises:
        CheckpointError: as in `checkpoint_addresses`, or a file is missing or damaged.
    """
    addresses = checkpoint_addresses(reader)
    assert addresses is not None
    modules = {layer: decoder.layers[layer].get_submodule("engram") for layer in addresses.layers}
    engrams = {layer: module for layer, module in modules.items() if isinstance(module, Engram)}
    return EngramReader(addresses, mapped_tables(reader, addresses), engrams)
