"""Erasing, replacing and merging blocks of a bank, with their optimizer state.

A checkpoint is never changed. The result is a new run folder, which can be trained further (`checkpoint.resume`),
evaluated and exported like any other.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, groupby, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kmem.checkpoint.bank.hits import FIRST, KEPT, edited_usage, stored_hits
from kmem.checkpoint.bank.layout import bank_layout
from kmem.checkpoint.bank.rows import Selection, cluster_path, held_mask, select, trained_rows, written_norms
from kmem.checkpoint.commit import WEIGHT, Progress
from kmem.checkpoint.pieces import CHUNK_ELEMENTS, CheckpointError
from kmem.checkpoint.reader import CheckpointReader
from kmem.checkpoint.rewriting import rewrite_run
from kmem.config import Config, parse_config
from kmem.model.bank_layout import BankLayout, layer_bank_name
from kmem.wording import counted

LISTED = 5


@dataclass(frozen=True)
class Changed:
    """What an edit changed on a level."""

    level: int
    clusters: int
    """Changed rows, generic blocks included."""
    values: int
    bytes: int
    norm: float
    """2-norm of what these blocks wrote before the edit."""


Edited = tuple[Path, list[Changed]]
"""Folder of the new checkpoint, and what changed on each level."""


@dataclass(frozen=True)
class Source:
    """A checkpoint to merge."""

    reader: CheckpointReader
    paths: tuple[str, ...] = ()
    """Subtrees to take from it. None given: the subtrees whose text it has read or, if it ran on all text, the clusters
    that it has trained."""

    def own_paths(self, start: CheckpointReader | None) -> tuple[str, ...]:
        """The subtrees to take from it, where they are named or known; else none.

        Args:
            start: the checkpoint that it continued from.
        """
        if self.paths:
            return self.paths
        progress = self.reader.commit.progress
        before: Mapping[str, int] = {}
        if start is not None and goes_on_from(progress, start):
            before = start.commit.progress.sequences_read
        read = [text for text, count in progress.sequences_read.items() if count > before.get(text, 0)]
        return () if "" in read else tuple(path for text in read for path in text.split(","))


def goes_on_from(progress: Progress, start: CheckpointReader) -> bool:
    """Whether a run that began with the bank of `start` took over the whole checkpoint, not only its weights."""
    return bank_origin(progress)["start"] == bank_origin(start.commit.progress)["start"]


def bank_origin(progress: Progress) -> dict[str, Any]:
    """Origin of a checkpoint's bank: `seed` of its initial blocks, and `start`, the checkpoint whose blocks it began
    with. None where unknown; `start` is also None for a bank that began new."""
    return {"seed": None, "start": None, **progress.memories.get("bank", {})}


def erase(reader: CheckpointReader, out: Path, paths: list[str], subtree: bool) -> Edited:
    """Reset clusters to their initial blocks, which change nothing, without optimizer state: as if no text had reached
    them.

    Raises:
        UserError: a path outside the tree, or a folder that cannot be written.
    """
    layout = bank_layout(reader)
    reader.check_whole()
    chosen = select(layout, paths, subtree)
    owners = {level: torch.where(rows, FIRST, KEPT) for level, rows in chosen.items()}
    return _written(reader, out, layout, owners, [], f"erased {_named(paths, subtree)}")


def replace_blocks(
    reader: CheckpointReader, out: Path, paths: list[str], subtree: bool, other: CheckpointReader
) -> Edited:
    """Take the blocks of clusters, with their optimizer state, from another checkpoint.

    Raises:
        UserError: a path outside the tree, a different bank, tree or anchor, or a folder that cannot be written.
    """
    layout = bank_layout(reader)
    for checkpoint in (reader, other):
        checkpoint.check_whole()
    chosen = select(layout, paths, subtree)
    _check_same_bank(reader, other)
    _check_same_anchor(reader, other)
    owners = {level: torch.where(rows, 0, KEPT) for level, rows in chosen.items()}
    note = f"replaced {_named(paths, subtree)} by the blocks of {other.folder.parent.parent.name}"
    return _written(reader, out, layout, owners, [other], note)


def merge(sources: Sequence[Source], out: Path, start: CheckpointReader | None = None) -> tuple[Edited, list[str]]:
    """Join checkpoints that were trained on different clusters with the same frozen anchor into one. Each gives its own
    rows.

    Args:
        start: the checkpoint that all started from, if its bank had been trained.

    Returns:
        The edit, and remarks for the user.

    Raises:
        UserError: different banks, trees or anchors, a cluster claimed by two sources, a path outside the tree, a start
            that is not named, or a folder that cannot be written.
    """
    readers = [source.reader for source in sources]
    layout = bank_layout(readers[0])
    for source in sources if start is None else ():
        reader = source.reader
        if _trained_elsewhere(reader, layout):
            raise CheckpointError(
                f"{reader.folder}: holds only the blocks of its subtrees, and continued from a checkpoint that had "
                "trained others, too; name that checkpoint with --start"
            )
        began_with = bank_origin(reader.commit.progress)["start"]
        if began_with is not None:
            raise CheckpointError(
                f"{reader.folder}: began with the blocks of {began_with}; name that checkpoint, where it is now, with "
                "--start, to tell which blocks the run itself has trained"
            )
    for other in (*readers[1:], *([] if start is None else [start])):
        _check_same_bank(readers[0], other)
        _check_same_anchor(readers[0], other)
    own, remarks = [], []
    trained: list[Selection] = []
    for source in sources:
        its_rows = {level: trained_rows(source.reader, start, layout, level) for level in layout.levels}
        trained.append(its_rows)
        paths = source.own_paths(start)
        if not paths:
            own.append(its_rows)
            continue
        for path in source.paths:
            named = select(layout, [path])
            if not any(bool((named[level] & its_rows[level]).any()) for level in layout.levels):
                raise CheckpointError(
                    f"cluster {path}: {source.reader.folder} has not trained it; name clusters that it has trained, "
                    "as kmem bank list shows, or none to take them all"
                )
        own.append(select(layout, list(paths)))
        outside = [path for level in layout.levels for path in _paths(layout, level, its_rows[level] & ~own[-1][level])]
        if outside:
            remarks.append(
                f"{source.reader.folder}: {counted(len(outside), 'cluster')} that it trained outside "
                f"{', '.join(paths)}, left out: {_some(outside)}"
            )
    _check_disjoint(layout, sources, own)

    base = max(range(len(readers)), key=lambda number: readers[number].step)
    given = readers if start is None else [*readers, start]
    owners = {}
    for level in layout.levels:
        owner = torch.full((layout.rows(level),), KEPT)
        # Rows that the base trained but does not own, and rows that it does not hold, get their first values.
        elsewhere = trained[base][level] | ~held_mask(readers[base].config, layout, level)
        owner[elsewhere] = FIRST if start is None else len(readers)
        for number, rows in enumerate(own):
            owner[rows[level]] = KEPT if number == base else number
        owners[level] = owner
    note = "merged " + ", ".join(reader.run_folder.name for reader in readers)
    progress = _joined_progress(readers, base, start)
    config = _whole(readers[base].config, _joined_subtrees(readers))
    # A run that began with only the weights of the start did not have the optimizer state of its rows.
    weights_of = None if start is None or goes_on_from(progress, start) else len(readers)
    return _written(readers[base], out, layout, owners, given, note, progress, config, weights_of), remarks


def _trained_elsewhere(reader: CheckpointReader, layout: BankLayout) -> bool:
    """Whether text has reached clusters whose blocks the checkpoint does not hold: an earlier run trained them."""
    hits = stored_hits(reader)
    if hits is None:
        return False
    leaves = len(hits) - 1  # the last count belongs to generic blocks
    held = held_mask(reader.config, layout, len(layout.ranks))[:leaves]
    return bool((hits[:leaves][~held] > 0).any())


def _joined_progress(readers: Sequence[CheckpointReader], base: int, start: CheckpointReader | None) -> Progress:
    """Progress of the base run, with the text that all runs have read."""
    of_runs = [reader.commit.progress for reader in readers]

    def summed(count: str) -> int:
        """The sum over all runs; what they continued from counts once."""
        before = 0 if start is None else getattr(start.commit.progress, count)
        since = [before if start is not None and goes_on_from(progress, start) else 0 for progress in of_runs]
        return max(since) + sum(getattr(progress, count) for progress in of_runs) - sum(since)

    positions: dict[str, int] = {}
    for text, count in (pair for progress in of_runs for pair in progress.sequences_read.items()):
        positions[text] = max(count, positions.get(text, 0))
    read, tokens = summed("consumed_samples"), summed("tokens")
    return replace(of_runs[base], consumed_samples=read, tokens=tokens, positions=positions)


def _joined_subtrees(readers: Sequence[CheckpointReader]) -> tuple[str, ...] | None:
    """`data.addresses.subtrees` with which a merged run trains on: the text of all runs."""
    chosen: set[str] = set()
    for reader in readers:
        addresses = reader.config.data.addresses
        if addresses is None or addresses.subtrees is None:
            return None
        chosen |= set(addresses.subtrees)
    every = {str(child) for child in range(bank_layout(readers[0]).children)} <= chosen
    outermost = {path for path in chosen if not any(path.startswith(f"{other}.") for other in chosen)}
    return None if every else tuple(outermost)


def _whole(config: Config, subtrees: tuple[str, ...] | None) -> Config:
    """The configuration of a run that holds all blocks. If the run was on subtrees, `subtrees` replace them."""
    if config.data.addresses is None or config.data.addresses.subtrees is None:
        return config
    tree = config.model_dump(mode="json")
    tree["bank"]["hold"] = "all"
    tree["data"]["addresses"]["subtrees"] = None if subtrees is None else list(subtrees)
    return parse_config(tree)


def _written(
    base: CheckpointReader,
    out: Path,
    layout: BankLayout,
    owners: Mapping[int, Tensor],
    sources: Sequence[CheckpointReader],
    note: str,
    progress: Progress | None = None,
    config: Config | None = None,
    weights_of: int | None = None,
) -> Edited:
    """Copy `base`, and take the rows that `owners` names from elsewhere.

    Args:
        owners: level -> [rows] KEPT, FIRST, or the number of a source.
        progress, config: progress and configuration of the new checkpoint; default: as in `base`.
        weights_of: number of a source that gives only weights; its rows get no optimizer state.
    """
    figures = []
    for level, owner in owners.items():
        changed = owner != KEPT
        norms = written_norms(base, layout, level)[changed]
        count, itemsize = int(changed.sum()), base.tensors[layer_bank_name(layout.layers[0], level)].dtype.itemsize
        values = count * layout.row_values(level)
        if count:
            figures.append(Changed(level, count, values, values * itemsize, float(norms.norm())))
    of_name = {layer_bank_name(layer, level): (layer, level) for level in layout.levels for layer in layout.layers}
    lists = {level: owner.tolist() for level, owner in owners.items()}
    seed = bank_origin(base.commit.progress)["seed"]
    seed = base.config.train.init_seed if seed is None else seed
    with_usage = [None if number == weights_of else source for number, source in enumerate(sources)]
    usage = edited_usage(base, with_usage, layout, owners)

    def edit(key: str, start: int, values: Tensor) -> Tensor:
        if key in usage:
            return usage[key][start : start + len(values)]
        kind, _, name = key.partition("/")
        if name not in of_name:
            return values
        layer, level = of_name[name]
        width = base.row_width(key)
        if width is None:
            return values
        values = values.clone()
        for owner, first, last in _runs(lists[level], start // width, -(-(start + len(values)) // width)):
            low, high = max(first * width, start), min(last * width, start + len(values))
            target = values[low - start : high - start]
            weight = kind == WEIGHT.rstrip("/")
            if owner >= 0 and key in sources[owner].commit.tensors and (weight or owner != weights_of):
                target.copy_(sources[owner].read_stored(key, low, high))
            elif weight:
                block = layout.of_layers([layer]).initial_rows(seed, level, first, last).view(-1)
                target.copy_(block[low - first * width : high - first * width])
            else:
                target.zero_()
        return values

    return rewrite_run(base, out, note, edit, progress, config), figures


def _runs(owners: list[int], start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """(owner, first, end) of consecutive rows in [start, stop) that are not kept."""
    for owner, group in groupby(range(start, stop), key=owners.__getitem__):
        if owner != KEPT:
            rows = list(group)
            yield owner, rows[0], rows[-1] + 1


def _check_same_bank(one: CheckpointReader, other: CheckpointReader) -> None:
    """Check that both have blocks of the same form, for clusters of the same tree."""
    first, second = bank_layout(one), bank_layout(other)
    if first != second:
        names = [name for name in vars(first) if getattr(first, name) != getattr(second, name)]
        raise CheckpointError(
            f"{other.folder}: the form of its bank differs from {one.folder}: {', '.join(names)} (model.bank); "
            "blocks fit only a bank of the same form"
        )
    if None not in (one.tree, other.tree) and one.tree != other.tree:
        raise CheckpointError(
            f"{other.folder}: its bank was trained with another cluster tree than {one.folder}: the same path names "
            "other documents"
        )
    optimizers = [reader.config.bank.optimizer.name for reader in (one, other)]
    if optimizers[0] != optimizers[1] and all(_has_row_state(reader) for reader in (one, other)):
        raise CheckpointError(
            f"{other.folder}: bank.optimizer.name is {optimizers[1]}, and {optimizers[0]} in {one.folder}: neither can "
            "use the state of the other; begin with only the weights of one (checkpoint.start)"
        )
    for key in one.commit.tensors.keys() & other.commit.tensors.keys():
        types = [reader.commit.tensors[key].dtype for reader in (one, other)]
        if types[0] != types[1]:
            raise CheckpointError(f"{other.folder}: {key} is {types[1]}, and {types[0]} in {one.folder} (bank.dtype)")


def _has_row_state(reader: CheckpointReader) -> bool:
    """Whether the checkpoint stores more than the values of its blocks."""
    return any(not key.startswith(WEIGHT) for key in reader.commit.tensors if ".bank." in key)


def _check_same_anchor(one: CheckpointReader, other: CheckpointReader) -> None:
    """Check that everything but the bank is equal to the bit: blocks are trained for one anchor."""
    layout = bank_layout(one)
    bank = {layer_bank_name(layer, level) for layer in layout.layers for level in layout.levels}
    differing = sorted((one.tensors.keys() ^ other.tensors.keys()) - bank)
    if not differing:
        changed = (name for name in one.tensors if name not in bank and not _same_values(one, other, name))
        differing = list(islice(changed, 1))
    if differing:
        raise CheckpointError(
            f"{other.folder}: its anchor differs from the anchor of {one.folder} ({_some(differing)}); blocks are "
            "trained for one anchor: train with model.bank.anchor=frozen from one checkpoint"
        )


def _same_values(one: CheckpointReader, other: CheckpointReader, name: str) -> bool:
    size = one.tensors[name].numel()
    slices = ((WEIGHT + name, start, min(start + CHUNK_ELEMENTS, size)) for start in range(0, size, CHUNK_ELEMENTS))
    return one.tensors[name].shape == other.tensors[name].shape and all(
        torch.equal(one.read_stored(*part), other.read_stored(*part)) for part in slices
    )


def _check_disjoint(layout: BankLayout, sources: Sequence[Source], own: Sequence[Selection]) -> None:
    for level in layout.levels:
        for (first, mine), (second, theirs) in combinations(zip(sources, own, strict=True), 2):
            shared = _paths(layout, level, mine[level] & theirs[level])
            if shared:
                raise CheckpointError(
                    f"level {level}, cluster {_some(shared)}: claimed by {first.reader.folder} and by "
                    f"{second.reader.folder}; each cluster has one source: name subtrees after each checkpoint, as in "
                    "--from RUN 0 1 --from RUN 2, or name the trained checkpoint that all continued from with --start"
                )


def _paths(layout: BankLayout, level: int, rows: Tensor) -> list[str]:
    return [cluster_path(layout, level, row) for row in rows.nonzero().flatten().tolist()]


def _named(paths: Sequence[str], subtree: bool) -> str:
    return ", ".join(paths) + (" with all below" if subtree else "")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
