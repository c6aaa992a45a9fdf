"""The bank of an evaluated checkpoint, and its controls: does the bank know what the text of its clusters says, or does
it only add parameters?"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from kmem.checkpoint.bank.layout import checkpoint_tree
from kmem.checkpoint.bank.options import set_controls
from kmem.clustering.applying import leaves_around
from kmem.config import AddressesConfig, ConfigError
from kmem.data.reader import SequenceReader
from kmem.data.workers import available_cores
from kmem.eval.memory_kinds import EvaluatedMemory
from kmem.model.bank_export import ExportedBank
from kmem.model.bank_router import descend_elsewhere
from kmem.model.bank_tree import ClusterTree


class EvaluatedBank(EvaluatedMemory):
    """The bank of a checkpoint. Sequences of data are read from the result of `around`.

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
