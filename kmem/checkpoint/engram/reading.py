"""The engram of a checkpoint for use in one process: its addressing is checked, its rows stay in the files."""

from pathlib import Path
from typing import Any, Protocol

from kmem.checkpoint.manifest import check_addressing
from kmem.checkpoint.pieces import CheckpointError
from kmem.config import Config
from kmem.data.engram_addresses import model_addresses
from kmem.model.engram_reader import EngramAddresses


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
