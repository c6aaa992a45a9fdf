"""The engram of a checkpoint for use in one process: its addressing is checked, its rows stay in the files."""

from kmem.checkpoint.manifest import check_addressing
from kmem.checkpoint.pieces import CheckpointError
from kmem.checkpoint.trained_model import TrainedModel
from kmem.data.engram_addresses import model_addresses
from kmem.model.engram_reader import EngramAddresses


def checkpoint_addresses(reader: TrainedModel) -> EngramAddresses | None:
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
