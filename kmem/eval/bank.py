"""The bank of an evaluated checkpoint, and its controls: does the bank know what the text of its clusters says, or does
it only add parameters?"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from kmem.checkpoint.bank.layout import bank_layout, checkpoint_router, checkpoint_tree
from kmem.checkpoint.bank.options import set_controls
from kmem.checkpoint.controls import Choices
from kmem.checkpoint.reader import CheckpointReader
from kmem.clustering.applying import leaves_around
from kmem.config import ConfigError
from kmem.data.bank_addresses import Addressing
from kmem.data.batch import SequenceBatch
from kmem.data.reader import SequenceReader
from kmem.data.workers import available_cores
from kmem.hf.memory_folders import mapped_tables
from kmem.model.bank_blocks import BankInput
from kmem.model.bank_inference import InferenceBank
from kmem.model.bank_kind import BankKind
from kmem.model.bank_router import ContextRouter
from kmem.model.bank_tree import ClusterTree


class EvaluatedBank:
    """The bank of a checkpoint, whose rows stay in the checkpoint's files.

    Raises:
        UserError: the bank lacks the control, a level or a cluster to block; or no cluster is left open.
        CheckpointError: no tree, or another tree.
    """

    def __init__(self, reader: CheckpointReader, choices: Choices) -> None:
        layout = bank_layout(reader.config)
        assert layout is not None
        self._reader, self._choice = reader, choices.bank
        choice = choices.bank
        trained = "fetched" if choice.blocked else reader.config.model.shape.bank_control
        control = choices.controls.get("bank", trained)
        self._blocked = control == "blocked"
        self._bank = InferenceBank(layout, mapped_tables(reader, BankKind()))
        set_controls(self._bank, "fetched" if self._blocked else control, choice.levels)
        self._tree: ClusterTree | None = None
        self._router: ContextRouter | None = None
        try:
            if choice.blocked:
                own = range(self._loaded_tree().children) if self._blocked else ()  # each is blocked for some context
                for paths in (choice.blocked, *([(cluster,), *choice.blocked] for cluster in own)):
                    self._loaded_tree().check_blocked(paths)
        except ValueError as error:
            raise ConfigError(f"--blocked: {error}") from None

    @property
    def addressing(self) -> Addressing | None:
        """The addressing that evaluated data must have, with the same batching as the run; None if neither the control
        nor the sequences need addresses."""
        trained_on = self._reader.config.data.addresses
        batching = "packed" if trained_on is None else trained_on.batching
        if self._bank.control != "fetched" and batching == "packed":
            return None
        return Addressing(checkpoint_tree(self._reader, self._choice.tree), batching)

    def around(self, held_out: SequenceReader, folder: Path, samples: Sequence[int]) -> SequenceReader:
        """Held-out sequences whose addresses avoid blocked clusters. A document or window whose leaf is blocked gets
        the leaf to which its own embedding then descends; all others keep the stored leaf.

        Args:
            held_out: sequences of this prepared folder alone, opened with `addressing`.
            samples: sequences that will be read; units of other sequences are not embedded.

        Raises:
            UserError: the tree's embedder is missing or damaged.
        """
        paths = self._choice.blocked
        if self._bank.control != "fetched" or not (self._blocked or paths):
            return held_out
        leaves, units = held_out.leaves, held_out.units(samples)
        if not self._blocked:
            units = units[self._loaded_tree().blocked_leaves(paths).numpy()[leaves[units]]]
        own = leaves[units] if self._blocked else None
        tree = checkpoint_tree(self._reader, self._choice.tree)
        leaves[units] = leaves_around(folder, "validation", units, tree, paths, own, available_cores())
        return held_out.with_leaves(leaves)

    def of_batch(self, batch: SequenceBatch, like: Tensor) -> dict[int, BankInput]:
        """Layer -> input of its bank for sequences of data, which are read from the result of `around`."""
        leaves = None
        if self._bank.control == "fetched":
            assert batch.addresses is not None, "data is opened with the addressing that this names"
            leaves = batch.addresses
        return self._inputs(leaves, batch.input_ids, like)

    def of_prompts(self, prompts: Sequence[Sequence[int]], ids: Tensor, like: Tensor) -> dict[int, BankInput]:
        """Layer -> input of its bank for token ids [B, T] whose contexts are these prompts."""
        leaves = None
        if self._bank.control == "fetched":
            router = self._loaded_router()
            contexts = [torch.tensor(prompt) for prompt in prompts]
            leaves = (router.other_leaves if self._blocked else router.leaves)(contexts, self._choice.blocked)
        return self._inputs(leaves, ids, like)

    def _inputs(self, leaves: Tensor | None, ids: Tensor, like: Tensor) -> dict[int, BankInput]:
        batch, tokens = ids.shape
        return self._bank.inputs(leaves, batch, tokens, like)

    def _loaded_tree(self) -> ClusterTree:
        if self._tree is None:
            self._tree = ClusterTree.load(checkpoint_tree(self._reader, self._choice.tree))
        return self._tree

    def _loaded_router(self) -> ContextRouter:
        if self._router is None:
            self._router = checkpoint_router(self._reader, self._choice.tree)
        return self._router
