"""A few typical words for each cluster of the first level."""

import numpy as np
from numpy.typing import NDArray

from kmem.clustering.corpus import Corpus, read_units
from kmem.data.order import permutation
from kmem.data.tokenizer import load_tokenizer
from kmem.data.units import Unit

_UNITS_PER_CLUSTER, _TOKENS_PER_UNIT = 1024, 4096
WORDS = 8


def typical_words(
    corpora: list[Corpus], unit: Unit, clusters: NDArray[np.int32], children: int, seed: int
) -> list[list[str]]:
    """For each cluster of the first level, at most `WORDS` words by decreasing weight.

    The weight of a token is the product of three factors, counted in a sample of units from each cluster: its share of
    the cluster's tokens; the logarithm of this share over its mean in all clusters; and the logarithm of one over the
    share of units that it occurs in. Words are tokens of four letters or more that begin a word in the tokenizer.

    Args:
        clusters: [training units of all corpora] the cluster of each unit, below `children`.
    """
    counts = np.zeros((children, corpora[0].manifest.tokenizer.size), dtype=np.int64)
    occurs, seen = np.zeros(counts.shape[1], dtype=np.int64), 0
    before = 0
    for number, corpus in enumerate(corpora):
        units = corpus.units("train", unit)
        mine = clusters[before : before + len(units)]
        before += len(units)
        shuffled = permutation(seed, f"words/{number}", 0, "units", len(units))
        for cluster in range(children):
            chosen = shuffled[mine[shuffled] == cluster][:_UNITS_PER_CLUSTER]
            for ids in read_units(corpus.folder, corpus.fingerprint, "train", unit, chosen):
                counted = np.bincount(ids[:_TOKENS_PER_UNIT].numpy(), minlength=counts.shape[1])
                counts[cluster] += counted
                occurs += counted > 0
                seen += 1
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    above = np.log(np.divide(share, share.mean(axis=0), out=np.ones_like(share), where=share > 0))
    weight = share * above * np.log((1 + seen) / (1 + occurs))
    tokenizer = load_tokenizer(corpora[0].folder / "tokenizer")
    by_cluster = []
    for row in weight:
        words: list[str] = []
        for token in np.argsort(-row, kind="stable"):
            if row[token] <= 0 or len(words) == WORDS:
                break
            text = tokenizer.decode([int(token)])
            word = text.strip()
            if text[:1].isspace() and len(word) > 3 and word.isalpha() and word.lower() not in words:
                words.append(word.lower())
        by_cluster.append(words)
    return by_cluster
