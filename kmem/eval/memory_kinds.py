"""Memories of a checkpoint in one process, by kind."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from kmem.checkpoint.controls import Choices
from kmem.checkpoint.reader import CheckpointReader
from kmem.data.batch import SequenceBatch
from kmem.eval.bank import EvaluatedBank
from kmem.eval.engram import EvaluatedEngram
from kmem.model.decoder import Decoder


class EvaluatedMemory(Protocol):
    """One kind of memory, with a control or as it was trained."""

    def of_batch(self, batch: SequenceBatch, like: Tensor) -> dict[int, Any]:
        """What each layer reads for sequences of data. `like` is a tensor of the model's dtype and device."""

    def of_prompts(self, prompts: Sequence[Sequence[int]], ids: Tensor, like: Tensor) -> dict[int, Any]:
        """What each layer reads for token ids [B, T] that begin with these prompts."""


OPEN: dict[str, Callable[[CheckpointReader, Decoder, Choices], EvaluatedMemory]] = {
    "engram": EvaluatedEngram,
    "bank": lambda reader, _, choices: EvaluatedBank(reader, choices),
}
"""Kind -> function that opens it."""
