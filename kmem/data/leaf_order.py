"""The order of a corpus whose sequences hold one leaf each: units are permuted, joined within their leaf and cut; then
the sequences of all leaves are permuted (hierarchical memories, arXiv 2510.02375, section 4: data format)."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from kmem.data.order import Epoch, Indices, offsets_of, permutation


class LeafOrder:
    """Epochs of one corpus whose units have leaves: a pure function of (seed, digest, epoch).

    A leaf of L tokens makes ceil(L / sequence_length) sequences; the last one is padded. So each epoch reads every
    token exactly once and has the same number of sequences; which tokens share a sequence changes. The two most
    recently used epochs are kept.

    If only some leaves are chosen, an epoch is the epoch of all leaves without the sequences of the others.
    """

    def __init__(
        self,
        lengths: Indices,
        leaves: NDArray[np.int32],
        sequence_length: int,
        seed: int,
        digest: str | None,
        chosen: NDArray[np.bool_] | None = None,
    ):
        """
        Args:
            lengths: [units] tokens of each unit.
            leaves: [units] the leaf of each unit.
            digest: identifies the content and its addresses; None keeps units and sequences in stored order, leaf after
                leaf, in every epoch.
            chosen: bool [leaves of the tree], whether a leaf's sequences are read; None: all are read.
        """
        self._lengths, self._leaves = lengths, np.asarray(leaves)
        self._seed, self._digest = seed, digest
        self._tokens_F = np.bincount(self._leaves, weights=lengths).astype(np.int64)  # exact below 2^53
        self._spans_F = -(-self._tokens_F // sequence_length)
        self._begins_F = offsets_of(self._spans_F) * sequence_length
        self.all_spans = int(self._spans_F.sum())
        """Sequences per epoch of all leaves, chosen or not."""
        read_F = np.ones(len(self._tokens_F), np.bool_) if chosen is None else chosen[: len(self._tokens_F)]
        self._read = np.repeat(read_F, self._spans_F)
        self.spans_per_epoch = int(self._spans_F[read_F].sum())
        self.padding = self.spans_per_epoch * sequence_length - int(self._tokens_F[read_F].sum())
        """Positions per epoch that hold no token."""
        ends = self._begins_F[:-1] + self._tokens_F
        self._ends = np.repeat(ends, self._spans_F)
        self.epoch = lru_cache(maxsize=2)(self._build)

    def _build(self, number: int) -> Epoch:
        """The order of one epoch, whose `documents` are units; `epoch` builds it on first use."""
        if self._digest is None:
            units = np.argsort(self._leaves, kind="stable")
            spans = np.arange(self.all_spans)
        else:
            shuffled = permutation(self._seed, self._digest, number, "units", len(self._lengths))
            units = shuffled[np.argsort(self._leaves[shuffled], kind="stable")]
            spans = permutation(self._seed, self._digest, number, "sequences", self.all_spans)
        spans = spans[self._read[spans]]
        # The units of a leaf follow one another; the next leaf begins with a new sequence.
        joined = offsets_of(self._lengths[units])
        leaf_start = offsets_of(self._tokens_F)[:-1]
        leaves = self._leaves[units]
        offsets = np.append(joined[:-1] - leaf_start[leaves] + self._begins_F[leaves], self._begins_F[-1])
        return Epoch(units, offsets, spans, self._ends)
