"""Memories of a checkpoint in one process, by kind."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kmem.checkpoint.bank.layout import checkpoint_tree
from kmem.checkpoint.bank.options import set_controls
from kmem.checkpoint.controls import Choices
from kmem.checkpoint.reader import CheckpointReader
from kmem.clustering.applying import leaves_around
from kmem.config import AddressesConfig, ConfigError
from kmem.data.batch import SequenceBatch
from kmem.data.reader import SequenceReader
from kmem.data.workers import available_cores
from kmem.hf.memory_folders import open_memory
from kmem.model.bank_export import ExportedBank
from kmem.model.bank_router import descend_elsewhere
from kmem.model.bank_tree import ClusterTree
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


class EvaluatedBank(EvaluatedMemory):
    """The bank of a checkpoint. Its controls ask whether it knows what the text of its clusters says, or only adds
    parameters. Sequences of data are read from the result of `around`.

    Raises:
        UserError: the bank lacks the control, a level or a cluster to block; or no cluster is left open.
        CheckpointError: no tree, or another tree.
    """

    _memory: ExportedBank

    def _choose(self, control: str | None) -> None:
        bank, options = self._memory.contexts, self._choices.bank
        control = control or ("fetched" if options.blocked else bank.control)
        self._blocked = control == "blocked"
        set_controls(bank, "fetched" if self._blocked else control, options.levels)
        try:
            if options.blocked:
                own = range(self._tree.children) if self._blocked else ()  # each is blocked for some context
                for paths in (options.blocked, *([(cluster,), *options.blocked] for cluster in own)):
                    self._tree.check_blocked(paths)
        except ValueError as error:
            raise ConfigError(f"--blocked: {error}") from None

    @property
    def addresses(self) -> AddressesConfig | None:
        """The addresses that evaluated data must have, with the same batching as the run; None if neither the control
        nor the sequences need addresses."""
        trained_on = self._reader.config.data.addresses
        batching = "packed" if trained_on is None else trained_on.batching
        if self._memory.control != "fetched" and batching == "packed":
            return None
        return AddressesConfig(tree=str(self._tree_folder), batching=batching)

    def around(self, held_out: SequenceReader, folder: Path, samples: Sequence[int]) -> SequenceReader:
        """Held-out sequences whose addresses avoid blocked clusters. A document or window whose leaf is blocked gets
        the leaf to which its own embedding then descends; all others keep the stored leaf.

        Args:
            held_out: sequences of this prepared folder alone, opened with `addresses`.
            samples: sequences that will be read; units of other sequences are not embedded.

        Raises:
            UserError: the tree's embedder is missing or damaged.
        """
        paths = self._choices.bank.blocked
        if self._memory.control != "fetched" or not (self._blocked or paths):
            return held_out
        leaves, units = held_out.leaves, held_out.units(samples)
        if not self._blocked:
            units = units[self._tree.blocked_leaves(paths).numpy()[leaves[units]]]
        own = leaves[units] if self._blocked else None
        leaves[units] = leaves_around(folder, "validation", units, self._tree_folder, paths, own, available_cores())
        return held_out.with_leaves(leaves)

    def _leaves(self, prompts: Sequence[Sequence[int]]) -> Tensor | None:
        if self._memory.control != "fetched":
            return None
        router = self._memory.contexts.loaded_router()
        embeddings = router.embed([torch.tensor(prompt) for prompt in prompts])
        descend = descend_elsewhere if self._blocked else ClusterTree.descend
        return descend(router.tree, embeddings, self._choices.bank.blocked)

    @property
    def _tree_folder(self) -> Path:
        return checkpoint_tree(self._reader, self._choices.bank.tree)

    @cached_property
    def _tree(self) -> ClusterTree:
        return ClusterTree.load(self._tree_folder)
