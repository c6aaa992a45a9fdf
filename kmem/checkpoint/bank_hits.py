"""How the tokens of a run are spread over the clusters of its memory bank."""

import torch
from torch import Tensor

from kmem.checkpoint.reader import CheckpointReader
from kmem.model.bank_layout import BankLayout

HITS = "hits/bank"
"""Name of the counts in a checkpoint: tokens since the run began by leaf, and last those of generic blocks."""
SHARES = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)
"""Edges of the histogram of hits, in even shares of a level's tokens."""


def stored_hits(reader: CheckpointReader) -> Tensor | None:
    """int64 [leaves + 1]; None of a checkpoint that has not counted."""
    found = reader.commit.tensors.get(HITS)
    return None if found is None else reader.read_stored(HITS, 0, found.size)


def cluster_tokens(layout: BankLayout, hits: Tensor, level: int) -> Tensor:
    """int64 [clusters of the level], generic blocks left out."""
    return hits[:-1].view(layout.clusters(level), -1).sum(1)


def hit_figures(layout: BankLayout, hits: Tensor, level: int) -> dict[str, object]:
    """Of the clusters of a level, generic blocks left out.

    Returns:
        gini: of their tokens, 0 where all have as many, 1 where one has all. histogram: clusters without tokens, then
        by their tokens in even shares, up to SHARES[0], .., more than SHARES[-1]. largest: in even shares.
    """
    tokens = cluster_tokens(layout, hits, level).double()
    total, count = tokens.sum().clamp_min(1), len(tokens)
    ranks = torch.arange(1, count + 1, dtype=torch.float64)
    gini = 2 * (ranks * tokens.sort().values).sum() / (count * total) - (count + 1) / count
    shares = tokens * count / total
    bins = torch.bucketize(shares[tokens > 0], torch.tensor(SHARES, dtype=torch.float64))
    histogram = [int((tokens == 0).sum()), *torch.bincount(bins, minlength=len(SHARES) + 1).tolist()]
    return {"gini": float(gini.clamp_min(0)), "histogram": histogram, "largest": float(shares.max())}
