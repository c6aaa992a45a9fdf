"""Rows of a checkpoint's bank: choosing them by the paths of their clusters, and figures of what they hold."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kmem.checkpoint.bank.hits import cluster_tokens, hit_figures, stored_hits
from kmem.checkpoint.pieces import CheckpointError
from kmem.checkpoint.reader import CheckpointReader
from kmem.config import Config, UserError
from kmem.model.bank_layout import BankLayout, layer_bank_name
from kmem.model.bank_tree import cluster_of, format_path, parse_path, path_of

GENERIC_PATH = "generic"
"""In place of a path: the generic blocks of all levels."""
SLICE_BYTES = 32 << 20

Selection = dict[int, Tensor]
"""Level -> bool [rows of its table]."""


def held_rows(config: Config, layout: BankLayout, level: int) -> list[range]:
    """Rows of a level's table that a run holds, ascending: all rows, or the rows that the text of its subtrees uses."""
    addresses = config.data.addresses
    if config.bank.hold == "all" or addresses is None or addresses.subtrees is None:
        return [range(layout.rows(level))]
    return layout.subtree_rows(level, [parse_path(path) for path in addresses.subtrees])


def held_mask(config: Config, layout: BankLayout, level: int) -> Tensor:
    """`held_rows` as bool [rows]."""
    mask = torch.zeros(layout.rows(level), dtype=torch.bool)
    for rows in held_rows(config, layout, level):
        mask[rows.start : rows.stop] = True
    return mask


def check_held(folder: Path, stored: Config, config: Config, own_run: bool) -> None:
    """Refuse a checkpoint that lacks blocks of this run, or whose additional blocks this run would lose.

    Args:
        stored: configuration of the checkpoint, with the same bank as `config`.
        own_run: whether it is a checkpoint of this run, which later checkpoints replace.

    Raises:
        CheckpointError: names the field and the remedy.
    """
    layout = BankLayout.of(config.model.shape)
    for level in layout.levels:
        theirs, ours = (held_mask(of, layout, level) for of in (stored, config))
        chosen = ", ".join((stored.data.addresses and stored.data.addresses.subtrees) or ())
        if bool((ours & ~theirs).any()):
            raise CheckpointError(
                f"bank.hold: {folder} holds only the blocks of the subtrees {chosen}, and this run has others; choose "
                "these subtrees with bank.hold=subtrees, or join the parts with kmem bank merge and begin with the "
                "result"
            )
        if own_run and bool((theirs & ~ours).any()):
            raise CheckpointError(
                f"bank.hold: {folder} holds more blocks than the chosen subtrees use, and the next checkpoints of "
                "this run would replace it without them; give the run another name and begin with this checkpoint "
                "(checkpoint.resume or checkpoint.start), or restore bank.hold and data.addresses.subtrees"
            )


def select(layout: BankLayout, paths: list[str], subtree: bool = True, with_blocks: bool = True) -> Selection:
    """The rows of clusters.

    Args:
        paths: such as `3` or `3.11`, from the root down, or `generic`.
        subtree: include all clusters below them.
        with_blocks: refuse clusters without blocks; if False, they have no rows.

    Raises:
        UserError: a path outside the tree, or a cluster without blocks.
    """
    chosen = {level: torch.zeros(layout.rows(level), dtype=torch.bool) for level in layout.levels}
    for path in paths:
        if path == GENERIC_PATH:
            if not layout.generic:
                raise UserError("generic: this bank has no generic blocks (bank.generic.probability is 0)")
            for level in layout.levels:
                chosen[level][layout.generic_row(level)] = True
            continue
        level, number = named_cluster(layout, path)
        if with_blocks and level not in layout.levels and not (subtree and max(layout.levels) > level):
            below = "; add --subtree for the clusters below it" if max(layout.levels) > level else ""
            raise UserError(f"cluster {path}: level {level} of this bank has no blocks (its rank is 0){below}")
        for lower in layout.levels:
            if lower == level or (subtree and lower > level):
                below = layout.children ** (lower - level)
                chosen[lower][number * below : (number + 1) * below] = True
    return chosen


def cluster_path(layout: BankLayout, level: int, row: int) -> str:
    """The path of a row's cluster, as users write it."""
    if layout.generic and row == layout.generic_row(level):
        return GENERIC_PATH
    return format_path(path_of(row, level, layout.children))


def named_cluster(layout: BankLayout, text: str) -> tuple[int, int]:
    """Level and number of the cluster that a path names.

    Raises:
        UserError: the tree has no such cluster.
    """
    try:
        return cluster_of(parse_path(text), layout.children, len(layout.ranks))
    except ValueError as error:
        raise UserError(str(error)) from None


def figures(
    reader: CheckpointReader, layout: BankLayout, paths: Sequence[str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Figures of each level, and of the named clusters and all clusters below them that have blocks."""
    chosen = select(layout, list(paths), with_blocks=False)  # refuses paths outside the tree
    hits = stored_hits(reader)
    levels: list[dict[str, Any]] = []
    clusters: list[dict[str, Any]] = []
    for level in layout.levels:
        norms = written_norms(reader, layout, level)
        of_clusters = norms[: layout.clusters(level)]
        trained = of_clusters[of_clusters != 0]
        stored = reader.tensors[layer_bank_name(layout.layers[0], level)].dtype
        held = sum(map(len, held_rows(reader.config, layout, level)))
        levels.append(
            {
                "level": level,
                "clusters": layout.clusters(level),
                "rank": layout.ranks[level - 1],
                "values_per_cluster": layout.row_values(level),
                "bytes": held * layout.row_values(level) * stored.itemsize,
                "untouched": len(of_clusters) - len(trained),
                "mean_norm": float(trained.mean()) if len(trained) else 0.0,
                "largest_norm": float(of_clusters.max()),
                "generic_norm": float(norms[-1]) if layout.generic else None,
                "hits": None if hits is None else hit_figures(layout, hits, level),
            }
        )
        tokens = None
        if hits is not None:  # the last row belongs to the generic blocks
            tokens = torch.cat([cluster_tokens(layout, hits, level), hits[-1:]]).tolist()
        clusters += [
            {
                "path": cluster_path(layout, level, row),
                "level": level,
                "norm": float(norms[row]),
                "untouched": bool(norms[row] == 0),
                "tokens": None if tokens is None else tokens[row],
            }
            for row in chosen[level].nonzero().flatten().tolist()
        ]
    for level, number in sorted({named_cluster(layout, path) for path in paths if path != GENERIC_PATH}):
        if level not in layout.levels:  # a named cluster without blocks has tokens all the same
            counted_tokens = None if hits is None else int(cluster_tokens(layout, hits, level)[number])
            bare = {"norm": None, "untouched": None, "tokens": counted_tokens}
            clusters.append({"path": cluster_path(layout, level, number), "level": level, **bare})
    return levels, sorted(clusters, key=lambda cluster: int(cluster["level"]))


def written_norms(reader: CheckpointReader, layout: BankLayout, level: int) -> Tensor:
    """fp64 [rows]: 2-norm, over all layers, of the parts of a level's blocks that write (down, b, values), which start
    as zeros: blocks with norm 0 still are the no-op they began as. Blocks that the checkpoint does not hold have 0.
    The level is read once, a slice of one layer's rows at a time."""
    squares = torch.zeros(layout.rows(level), dtype=torch.float64)
    for start, stop, layer in _slices(reader, layout, level):
        parts = layout.by_part(reader.read_rows(layer_bank_name(layer, level), start, stop))
        for part in layout.parts:
            if part.start == "zero":
                squares[start:stop] += parts[part.name].double().square().sum(dim=(1, 2))
    return squares.sqrt()


def trained_rows(reader: CheckpointReader, start: CheckpointReader | None, layout: BankLayout, level: int) -> Tensor:
    """bool [rows]: rows held by `reader` that were trained. They differ from the same rows of `start` or, without a
    start, write anything."""
    if start is None:
        return written_norms(reader, layout, level) != 0
    trained = torch.zeros(layout.rows(level), dtype=torch.bool)
    for first, last, layer in _slices(reader, layout, level):
        name = layer_bank_name(layer, level)
        one, other = (checkpoint.read_rows(name, first, last) for checkpoint in (reader, start))
        trained[first:last] |= (one != other).any(dim=1)
    return trained


def _slices(reader: CheckpointReader, layout: BankLayout, level: int) -> Iterator[tuple[int, int, int]]:
    """(first row, end, layer) of the held rows of a level, in slices of about SLICE_BYTES."""
    rows = max(1, SLICE_BYTES // (layout.block_values(level) * torch.float32.itemsize))
    for layer in layout.layers:
        for held in held_rows(reader.config, layout, level):
            for start in range(held.start, held.stop, rows):
                yield start, min(start + rows, held.stop), layer
