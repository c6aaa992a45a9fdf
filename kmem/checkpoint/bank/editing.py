"""Erasing, replacing and merging blocks of a memory bank, with the state of their optimizer.

A checkpoint is never changed: the result is a run folder of its own, which training continues from
(`checkpoint.resume`), and which is evaluated and exported as any other.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kmem.checkpoint.bank.hits import FIRST, KEPT, edited_usage, stored_hits
from kmem.checkpoint.bank.layout import bank_layout, bank_tensors
from kmem.checkpoint.bank.rows import Selection, changed_rows, cluster_path, held_mask, level_figures, select
from kmem.checkpoint.commit import Progress
from kmem.checkpoint.pieces import CheckpointError
from kmem.checkpoint.reader import WEIGHT, CheckpointReader
from kmem.checkpoint.rewriting import rewrite_run
from kmem.config import Config, parse_config
from kmem.model.bank_layout import BankLayout, layer_bank_name
from kmem.wording import counted

COMPARED = 1 << 24
"""Elements that are compared at a time."""
LISTED = 5


@dataclass(frozen=True)
class Changed:
    """What an edit changed on a level."""

    level: int
    clusters: int
    """Rows, generic blocks included."""
    values: int
    norm: float
    """2-norm of what these blocks wrote, before."""


@dataclass(frozen=True)
class Edited:
    """The result of an edit."""

    checkpoint: Path
    levels: tuple[Changed, ...]


@dataclass(frozen=True)
class Source:
    """A checkpoint to merge."""

    reader: CheckpointReader
    paths: tuple[str, ...] = ()
    """Subtrees that are its own; none: those whose text it has read, or, of a run on all text, the clusters that it has
    trained."""

    def own_paths(self, start: CheckpointReader | None) -> tuple[str, ...]:
        """The subtrees that are its own, where these are named or known.

        Args:
            start: the checkpoint that it has gone on from.
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
    """Whether a run that began with a checkpoint's bank has taken all of the checkpoint, or else its weights alone."""
    return bank_origin(progress)["start"] == bank_origin(start.commit.progress)["start"]


def bank_origin(progress: Progress) -> dict[str, Any]:
    """`seed` of the first blocks of a checkpoint's bank, and the checkpoint whose blocks it began with, `start`; None
    where not known, and of a bank that began new."""
    return {"seed": None, "start": None, **progress.memories.get("bank", {})}


def the_layout(reader: CheckpointReader) -> BankLayout:
    """The blocks of a checkpoint's bank.

    Raises:
        CheckpointError: it has none.
    """
    layout = bank_layout(reader.config)
    if layout is None:
        raise CheckpointError(f"{reader.folder}: has no memory bank (model.bank)")
    return layout


def erase(reader: CheckpointReader, out: Path, paths: list[str], subtree: bool) -> Edited:
    """Give clusters the blocks that they began with, which change nothing, and no optimizer state: as if no text had
    reached them.

    Raises:
        UserError: a path outside the tree, or a folder that cannot be written.
    """
    layout = the_layout(reader)
    reader.check_whole()
    chosen = select(layout, paths, subtree)
    owners = {level: torch.where(rows, FIRST, KEPT) for level, rows in chosen.items()}
    return _written(reader, out, layout, owners, [], f"erased {_named(paths, subtree)}")


def replace_blocks(
    reader: CheckpointReader, out: Path, paths: list[str], subtree: bool, other: CheckpointReader
) -> Edited:
    """Give clusters the blocks that they have in another checkpoint, with their optimizer state.

    Raises:
        UserError: a path outside the tree, another bank, tree or anchor, or a folder that cannot be written.
    """
    layout = the_layout(reader)
    for found in (reader, other):
        found.check_whole()
    chosen = select(layout, paths, subtree)
    _check_same_bank(reader, other)
    _check_same_anchor(reader, other)
    owners = {level: torch.where(rows, 0, KEPT) for level, rows in chosen.items()}
    note = f"replaced {_named(paths, subtree)} by those of {other.folder.parent.parent.name}"
    return _written(reader, out, layout, owners, [other], note)


def merge(sources: Sequence[Source], out: Path, start: CheckpointReader | None = None) -> tuple[Edited, list[str]]:
    """One checkpoint of several that were trained on different clusters with the same frozen anchor: each gives the
    rows that are its own.

    Args:
        start: the checkpoint that all started from, if its bank had been trained.

    Returns:
        What was taken, and remarks.

    Raises:
        UserError: other banks, trees or anchors, a cluster of two sources, a path outside the tree, a start that is
            not named, or a folder that cannot be written.
    """
    readers = [source.reader for source in sources]
    layout = the_layout(readers[0])
    for source in sources if start is None else ():
        reader = source.reader
        if _trained_elsewhere(reader, layout):
            raise CheckpointError(
                f"{reader.folder}: holds the blocks of its subtrees alone, and went on from a checkpoint that had "
                "trained others, too; name that with --start"
            )
        began_with = bank_origin(reader.commit.progress)["start"]
        if began_with is not None:
            raise CheckpointError(
                f"{reader.folder}: began with the blocks of {began_with}; name that checkpoint, "
                "or where it is now, with --start, so that what the run itself has trained is known"
            )
    for other in (*readers[1:], *([] if start is None else [start])):
        _check_same_bank(readers[0], other)
        _check_same_anchor(readers[0], other)
    own, remarks = [], []
    trained: list[Selection] = []
    for source in sources:
        found = {level: _trained(source.reader, start, layout, level) for level in layout.levels}
        trained.append(found)
        paths = source.own_paths(start)
        if not paths:
            own.append(found)
            continue
        for path in source.paths:
            named = select(layout, [path])
            if not any(bool((named[level] & found[level]).any()) for level in layout.levels):
                raise CheckpointError(
                    f"cluster {path}: {source.reader.folder} has not trained it; name the clusters that it has, which "
                    "kmem bank list says, or none for all of them"
                )
        own.append(select(layout, list(paths)))
        outside = [path for level in layout.levels for path in _paths(layout, level, found[level] & ~own[-1][level])]
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
        # Rows that the copied checkpoint trained and does not own, or does not hold, are what they began as.
        elsewhere = trained[base][level] | ~held_mask(readers[base].config, layout, level)
        owner[elsewhere] = FIRST if start is None else len(readers)
        for number, rows in enumerate(own):
            owner[rows[level]] = KEPT if number == base else number
        owners[level] = owner
    note = "merged " + ", ".join(reader.run_folder.name for reader in readers)
    progress = _joined_progress(readers, base, start)
    config = _whole(readers[base].config, _joined_subtrees(readers))
    # A run that began with the start's weights alone had none of the state of its rows.
    weights_of = None if start is None or goes_on_from(progress, start) else len(readers)
    return _written(readers[base], out, layout, owners, given, note, progress, config, weights_of), remarks


def _trained_elsewhere(reader: CheckpointReader, layout: BankLayout) -> bool:
    """Whether text has reached clusters whose blocks the checkpoint does not hold: those of a run before."""
    hits = stored_hits(reader)
    if hits is None:
        return False
    leaves = len(hits) - 1  # the last count is that of generic blocks
    held = held_mask(reader.config, layout, len(layout.ranks))[:leaves]
    return bool((hits[:leaves][~held] > 0).any())


def _joined_progress(readers: Sequence[CheckpointReader], base: int, start: CheckpointReader | None) -> Progress:
    """That of the run whose step is kept, with the text of all."""
    of_runs = [reader.commit.progress for reader in readers]

    def summed(count: str) -> int:
        """What all have read, and once what they went on from."""
        before = 0 if start is None else getattr(start.commit.progress, count)
        since = [before if start is not None and goes_on_from(progress, start) else 0 for progress in of_runs]
        return max(since) + sum(getattr(progress, count) for progress in of_runs) - sum(since)

    positions: dict[str, int] = {}
    for text, count in (pair for progress in of_runs for pair in progress.sequences_read.items()):
        positions[text] = max(count, positions.get(text, 0))
    read, tokens = summed("consumed_samples"), summed("tokens")
    return replace(of_runs[base], consumed_samples=read, tokens=tokens, positions=positions)


def _joined_subtrees(readers: Sequence[CheckpointReader]) -> tuple[str, ...] | None:
    """`data.addresses.subtrees` of a merged run that is trained on with its own configuration: the text of all."""
    chosen: set[str] = set()
    for reader in readers:
        addresses = reader.config.data.addresses
        if addresses is None or addresses.subtrees is None:
            return None
        chosen |= set(addresses.subtrees)
    every = {str(child) for child in range(the_layout(readers[0]).children)} <= chosen
    outermost = {path for path in chosen if not any(path.startswith(f"{other}.") for other in chosen)}
    return None if every else tuple(outermost)


def _whole(config: Config, subtrees: tuple[str, ...] | None) -> Config:
    """The configuration of a run with all blocks, on the text of these subtrees if it was on that of some."""
    if config.data.addresses is None or config.data.addresses.subtrees is None:
        return config
    tree = config.model_dump(mode="json")
    tree["bank"]["hold"] = "all"
    tree["data"]["addresses"]["subtrees"] = None if subtrees is None else list(subtrees)
    return parse_config(tree)


def _trained(reader: CheckpointReader, start: CheckpointReader | None, layout: BankLayout, level: int) -> Tensor:
    """Rows that were trained: they write, or differ from the start. bool [rows]."""
    if start is None:
        return ~level_figures(reader, layout, level).untouched
    return changed_rows(reader, start, layout, level)


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
    """Copy `base` with the rows that come from elsewhere.

    Args:
        owners: level -> [rows] KEPT, FIRST, or the number of a source.
        progress, config: of the new checkpoint; default: those of `base`.
        weights_of: number of a source of which the state of rows is not taken, but none.
    """
    figures = []
    for level, owner in owners.items():
        changed = owner != KEPT
        norms = level_figures(base, layout, level).norms[changed]
        count = int(changed.sum())
        if count:
            figures.append(Changed(level, count, count * layout.row_values(level), float(norms.norm())))
    of_name = {layer_bank_name(layer, level): (layer, level) for level in layout.levels for layer in layout.layers}
    lists = {level: owner.tolist() for level, owner in owners.items()}
    seed = bank_origin(base.commit.progress)["seed"]
    seed = base.config.train.init_seed if seed is None else seed
    counted = [None if number == weights_of else source for number, source in enumerate(sources)]
    usage = edited_usage(base, counted, layout, owners)

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

    return Edited(rewrite_run(base, out, note, edit, progress, config), tuple(figures))


def _runs(owners: list[int], start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """(where they come from, first, end) of consecutive rows in [start, stop) that do not stay."""
    for owner, found in groupby(range(start, stop), key=owners.__getitem__):
        if owner != KEPT:
            rows = list(found)
            yield owner, rows[0], rows[-1] + 1


def _check_same_bank(one: CheckpointReader, other: CheckpointReader) -> None:
    """Both have blocks of the same form, for clusters of the same tree."""
    first, second = the_layout(one), the_layout(other)
    if first != second:
        names = [name for name in vars(first) if getattr(first, name) != getattr(second, name)]
        raise CheckpointError(
            f"{other.folder}: its memory bank has another form than that of {one.folder}: {', '.join(names)} "
            "(model.bank); blocks of one bank fit no other"
        )
    if None not in (one.tree, other.tree) and one.tree != other.tree:
        raise CheckpointError(
            f"{other.folder}: its bank was trained with another cluster tree than that of {one.folder}: the same path "
            "names other documents"
        )
    optimizers = [reader.config.bank.optimizer.name for reader in (one, other)]
    if optimizers[0] != optimizers[1] and all(_has_row_state(reader) for reader in (one, other)):
        raise CheckpointError(
            f"{other.folder}: bank.optimizer.name is {optimizers[1]}, and {optimizers[0]} in {one.folder}: the state "
            "of one means nothing to the other; begin with the weights of one alone (checkpoint.start)"
        )
    for key in one.commit.tensors.keys() & other.commit.tensors.keys():
        types = [reader.commit.tensors[key].dtype for reader in (one, other)]
        if types[0] != types[1]:
            raise CheckpointError(f"{other.folder}: {key} is {types[1]}, and {types[0]} in {one.folder} (bank.dtype)")


def _has_row_state(reader: CheckpointReader) -> bool:
    """Whether the checkpoint has more of its blocks than their values."""
    return any(not key.startswith(WEIGHT) for key in reader.commit.tensors if ".bank." in key)


def _check_same_anchor(one: CheckpointReader, other: CheckpointReader) -> None:
    """Everything but the bank is the same to the bit: blocks are trained for one anchor."""
    bank = bank_tensors(the_layout(one))
    keys = {name for name in one.tensors if name not in bank} ^ {name for name in other.tensors if name not in bank}
    differing = sorted(keys)
    for name in one.tensors:
        if name in bank or differing:
            continue
        size = one.commit.tensors[WEIGHT + name].size
        if one.commit.shapes[name] != other.commit.shapes[name]:
            differing.append(name)
            continue
        for start in range(0, size, COMPARED):
            parts = [reader.read_stored(WEIGHT + name, start, min(start + COMPARED, size)) for reader in (one, other)]
            if not torch.equal(*parts):
                differing.append(name)
                break
    if differing:
        raise CheckpointError(
            f"{other.folder}: its anchor differs from that of {one.folder} ({_some(differing)}); blocks are trained "
            "for one anchor: train with model.bank.anchor=frozen from one checkpoint"
        )


def _check_disjoint(layout: BankLayout, sources: Sequence[Source], own: Sequence[Selection]) -> None:
    for level in layout.levels:
        for second in range(1, len(sources)):
            for first in range(second):
                shared = _paths(layout, level, own[first][level] & own[second][level])
                if shared:
                    folders = " and by ".join(str(sources[number].reader.folder) for number in (first, second))
                    raise CheckpointError(
                        f"level {level}, cluster {_some(shared)}: claimed by {folders}; each cluster has one source: "
                        "name the subtrees of each after its checkpoint, as in --from RUN 0 1 --from RUN 2, or the "
                        "trained checkpoint that all went on from with --start"
                    )


def _paths(layout: BankLayout, level: int, rows: Tensor) -> list[str]:
    return [cluster_path(layout, level, row) for row in rows.nonzero().flatten().tolist()]


def _named(paths: Sequence[str], subtree: bool) -> str:
    return ", ".join(paths) + (" with all below" if subtree else "")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
