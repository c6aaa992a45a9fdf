"""How the tokens of a run are spread over the clusters of its bank, and when each cluster was last trained."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kmem.checkpoint.reader import CheckpointReader
from kmem.model.bank_layout import BankLayout, bank_table_name

HITS = "hits/bank"
"""Name of the token counts in a checkpoint: tokens per leaf since the run began, and last the tokens of generic
blocks."""
LAST_STEP, STEPS = "last_use", "steps/bank"
"""Prefix of the last step that used each row of a level (0: none), and name of the number of steps."""
KEPT, FIRST = -1, -2
"""Where a row of an edited checkpoint comes from: the copied checkpoint, or its initial values. Any other number is the
number of another checkpoint."""
SHARES = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)
"""Edges of the histogram of hits. The unit is the even share: a level's tokens divided by its clusters."""


def stored_hits(reader: CheckpointReader) -> Tensor | None:
    """int64 [leaves + 1]; None if the checkpoint has no counts."""
    stored = reader.commit.tensors.get(HITS)
    return None if stored is None else reader.read_stored(HITS, 0, stored.size)


def cluster_tokens(layout: BankLayout, hits: Tensor, level: int) -> Tensor:
    """int64 [clusters of the level], without generic blocks."""
    return hits[:-1].view(layout.clusters(level), -1).sum(1)


def hit_figures(layout: BankLayout, hits: Tensor, level: int) -> dict[str, object]:
    """How evenly tokens are spread over the clusters of a level, without generic blocks.

    Returns:
        gini: Gini coefficient of the tokens per cluster: 0 if all have equally many, 1 if one has all. histogram:
        number of clusters without tokens, then with up to SHARES[0] even shares, .., more than SHARES[-1]. largest:
        tokens of the largest cluster, in even shares.
    """
    tokens = cluster_tokens(layout, hits, level).double()
    total, count = tokens.sum().clamp_min(1), len(tokens)
    ranks = torch.arange(1, count + 1, dtype=torch.float64)
    gini = 2 * (ranks * tokens.sort().values).sum() / (count * total) - (count + 1) / count
    shares = tokens * count / total
    bins = torch.bucketize(shares[tokens > 0], torch.tensor(SHARES, dtype=torch.float64))
    histogram = [int((tokens == 0).sum()), *torch.bincount(bins, minlength=len(SHARES) + 1).tolist()]
    return {"gini": float(gini.clamp_min(0)), "histogram": histogram, "largest": float(shares.max())}


def last_step_name(level: int) -> str:
    """Name of the last steps of a level's rows in a checkpoint, int32 [rows]."""
    return f"{LAST_STEP}/{bank_table_name(level)}"


def edited_usage(
    base: CheckpointReader,
    sources: Sequence[CheckpointReader | None],
    layout: BankLayout,
    owners: Mapping[int, Tensor],
) -> dict[str, Tensor]:
    """Usage statistics of an edited copy of `base`: each row brings the statistics of the checkpoint it comes from. A
    leaf's tokens come with its row of the deepest level. Last steps are shifted, so that a row was used as many steps
    ago as in its own checkpoint.

    Args:
        sources: None for a source that gave only weights; its rows count as new.
        owners: level -> int64 [rows] KEPT, FIRST, or the number of a source.

    Returns:
        Name in the checkpoint -> values, for the statistics that `base` has.
    """
    usage, stored, deepest = {}, base.commit.tensors, layout.levels[-1]
    if HITS in stored:
        clusters, leaves = layout.clusters(deepest), layout.clusters(len(layout.ranks))
        of_leaf = owners[deepest][:clusters].repeat_interleave(leaves // clusters)
        of_generic = owners[deepest][clusters:] if layout.generic else torch.tensor([KEPT])
        usage[HITS] = _from_owners(base, sources, HITS, torch.cat([of_leaf, of_generic]))
    for level in layout.levels:
        if last_step_name(level) in stored:
            usage[last_step_name(level)] = _from_owners(base, sources, last_step_name(level), owners[level], True)
    return usage


def _from_owners(
    base: CheckpointReader, sources: Sequence[CheckpointReader | None], key: str, owner: Tensor, steps: bool = False
) -> Tensor:
    values = base.read_stored(key, 0, len(owner), absent=0)
    values[owner != KEPT] = 0
    for number, source in enumerate(sources):
        if source is not None and key in source.commit.tensors:
            theirs = source.read_stored(key, 0, len(owner), absent=0)
            if steps:
                later = int(base.read_stored(STEPS, 0, 1)) - int(source.read_stored(STEPS, 0, 1))
                theirs = torch.where(theirs > 0, (theirs + later).clamp_min(1), 0).to(theirs.dtype)
            values = torch.where(owner == number, theirs, values)
    return values
