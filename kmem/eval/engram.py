"""The engram of an evaluated checkpoint, and its controls: does the model gain from what its rows hold?"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kmem.checkpoint.controls import Choices
from kmem.checkpoint.engram.reading import checkpoint_engram
from kmem.checkpoint.reader import CheckpointReader
from kmem.data.batch import SequenceBatch
from kmem.model.decoder import Decoder


class EvaluatedEngram:
    """The engram of a checkpoint, whose rows stay in the checkpoint's files.

    Raises:
        CheckpointError: no addressing, another addressing, or a damaged file.
    """

    def __init__(self, reader: CheckpointReader, model: Decoder, choices: Choices) -> None:
        self._engram = checkpoint_engram(reader, model)
        self._engram.control = choices.controls.get("engram", "on")

    def of_batch(self, batch: SequenceBatch, like: Tensor) -> dict[int, Any]:
        """What each layer reads for sequences of data."""
        return self._engram.read(batch.input_ids.to(like.device), batch.document_ids.to(like.device))

    def of_prompts(self, prompts: Sequence[Sequence[int]], ids: Tensor, like: Tensor) -> dict[int, Any]:
        """What each layer reads for token ids [B, T], each row one document."""
        return self._engram.read(ids, torch.zeros_like(ids))
