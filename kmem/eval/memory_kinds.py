"""Memories of a checkpoint in one process, by kind."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kmem.checkpoint.controls import Choices
from kmem.checkpoint.reader import CheckpointReader
from kmem.config import ConfigError
from kmem.data.batch import SequenceBatch
from kmem.hf.memory_folders import open_memory
from kmem.model.decoder import Decoder
from kmem.model.exported_memory import ForwardTokens
from kmem.model.memory_kind import ModelKind


class EvaluatedMemory:
    """A memory with a control or as it was trained. Its rows stay in the checkpoint's files.

    Raises:
        UserError: the memory lacks its control.
        CheckpointError: what addresses the rows is missing or another, or a file is damaged.
    """

    def __init__(self, reader: CheckpointReader, kind: ModelKind, decoder: Decoder, choices: Choices) -> None:
        self._reader, self._choices = reader, choices
        self._memory, self._tensors = open_memory(reader, kind, decoder, choices.bank.tree)
        self._choose(choices.controls.get(kind.name))

    def of_batch(self, batch: SequenceBatch, like: Tensor) -> dict[int, Any]:
        """What each layer reads for sequences of data. `like` is a tensor of the model's dtype and device."""
        return self._read(batch.input_ids.to(like.device), batch.document_ids.to(like.device), batch.addresses, like)

    def of_prompts(self, prompts: Sequence[Sequence[int]], ids: Tensor, like: Tensor) -> dict[int, Any]:
        """What each layer reads for token ids [B, T] that begin with these prompts."""
        return self._read(ids, torch.zeros_like(ids), self._leaves(prompts), like)

    def _choose(self, control: str | None) -> None:
        """Set the control; None: as it was trained."""
        try:
            self._memory.control = control or self._memory.control
        except ValueError as error:
            raise ConfigError(f"--control {self._memory.kind.name}={control}: {error}") from None

    def _leaves(self, prompts: Sequence[Sequence[int]]) -> Tensor | None:
        """The address of each prompt, int64 [B]; None for a memory that reads tokens."""
        return None

    def _read(self, ids: Tensor, documents: Tensor, addresses: Tensor | None, like: Tensor) -> dict[int, Any]:
        like = like.new_empty(*ids.shape)
        return self._memory.inputs(
            ForwardTokens(like, ids, document_ids=documents, addresses=addresses, tensors=self._tensors)
        )
