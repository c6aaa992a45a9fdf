"""The order of a corpus: in each epoch documents are permuted, joined and cut into spans; then spans are permuted."""

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

ORDER_VERSION = 1
"""Version of the order, part of every data fingerprint: it changes whenever the same data and seed would be read in
another order."""

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Epoch:
    """One pass over a corpus of D documents and S spans."""

    documents: Indices
    """[D] the document at each place."""
    offsets: Indices
    """[D + 1] where each place begins in the joined stream, in tokens; the last entry is the stream's length."""
    spans: Indices
    """[S] the span of the stream that is read at each position of the epoch."""
    ends: Indices | None = None
    """[S] the end, in the stream, of the text that each span may hold; None: the stream's end for all."""


class CorpusOrder:
    """Epochs of one corpus: a pure function of (seed, corpus digest, epoch).

    A span covers sequence_length tokens of the joined stream and one more: the label of its last token, which is also
    the first token of the next span. Each epoch reads every span once. The last few tokens of the stream (fewer than a
    span) are left out; they differ from epoch to epoch. The two most recently used epochs are kept.
    """

    def __init__(self, lengths: Indices, sequence_length: int, seed: int, digest: str):
        """lengths: [D] tokens of each document, with its EOS. digest: identifies the corpus's content."""
        self._lengths = lengths
        self._seed = seed
        self._digest = digest
        self.spans_per_epoch = max(int(lengths.sum(dtype=np.int64)) - 1, 0) // sequence_length
        self.epoch = lru_cache(maxsize=2)(self._build)

    def _build(self, number: int) -> Epoch:
        """The order of one epoch; `epoch` builds it on first use."""
        documents = permutation(self._seed, self._digest, number, "documents", len(self._lengths))
        spans = permutation(self._seed, self._digest, number, "spans", self.spans_per_epoch)
        return Epoch(documents, offsets_of(self._lengths[documents]), spans)


def permutation(seed: int, digest: str, epoch: int, what: str, count: int) -> Indices:
    """A permutation of `count` items, int64 [count]; a pure function of the arguments."""
    return random_order(f"{seed}/{digest}/{epoch}/{what}", count)


def random_order(name: str, count: int) -> Indices:
    """A permutation of `count` items, int64 [count], that is drawn from a name."""
    # Raw Philox words are sorted, because NumPy promises that they never change between versions. It makes no such
    # promise for Generator.permutation, and a resumed run must not depend on NumPy's version.
    key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=16).digest(), "little")
    return np.argsort(np.random.Philox(key=key).random_raw(count), kind="stable")


def natural_order(lengths: Indices, sequence_length: int) -> Epoch:
    """Documents and spans in stored order; the last span may be shorter than sequence_length + 1 tokens."""
    tokens = int(lengths.sum(dtype=np.int64))
    spans = max(-(-(tokens - 1) // sequence_length), 0)
    return Epoch(np.arange(len(lengths)), offsets_of(lengths), np.arange(spans))


def offsets_of(lengths: Indices) -> Indices:
    """[D + 1] running sum of [D] lengths, starting at 0."""
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets
