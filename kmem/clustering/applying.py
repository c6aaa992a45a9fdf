"""Addresses of prepared folders from a tree that is there."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kmem.clustering.checks import check_device, check_unaddressed
from kmem.clustering.corpus import SPLITS, Corpus, open_corpora
from kmem.clustering.embedders import KINDS
from kmem.clustering.jobs import AddressJob, Leaves, address
from kmem.clustering.workspace import Pool, Workspace, clear_finished
from kmem.config import UserError
from kmem.data.bank_addresses import stored_leaves, write_addresses
from kmem.data.progress import Progress
from kmem.data.units import Unit
from kmem.model.bank_embedder import read_embedder_record
from kmem.model.bank_router import tree_with_embedder
from kmem.model.bank_tree import EMBEDDER_FOLDER, ClusterPath, ClusterTree

WORKING = ".clustering"
"""Folder in which a prepared folder gets addresses; ending of the one beside a tree in which that is made."""

_SMALLER_CHUNKS = 16
"""Work whose results stay in memory is cut so much smaller, for its progress to move and all workers to have some: of a
held-out split all may be one chunk."""


@dataclass(frozen=True)
class Addressed:
    """What became of the data."""

    tree: ClusterTree
    leaves: dict[Path, dict[str, Leaves]]
    """Of each folder and split."""
    unchanged: tuple[Path, ...] = ()
    """Folders that had these addresses before."""


def apply_tree(
    data: list[Path], tree_folder: Path, workers: int = 1, device: str = "cpu", force: bool = False
) -> Addressed:
    """Give prepared folders the addresses of a tree that is there; those that have them are left as they are.

    Interrupted, it leaves a folder `.clustering` in the prepared folder it was at, and the same call continues there.

    Args:
        force: replace addresses of another tree, and write those of this one anew.

    Raises:
        UserError: no such tree, a tree of another tokenizer, or folders with addresses of another tree.
    """
    corpora = open_corpora(data)
    tree_folder = Path(os.path.abspath(tree_folder))
    try:
        tree = tree_with_embedder(tree_folder)
        embedder = read_embedder_record(tree_folder / EMBEDDER_FOLDER)["name"]
    except ValueError as error:
        raise UserError(f"--tree {error}") from None
    check_device(embedder, device)
    for corpus in corpora:
        expected, found = tree.record["tokenizer"], corpus.manifest.tokenizer.fingerprint
        if expected is not None and expected != found:
            raise UserError(
                f"--tree {tree_folder}: its embedder {tree.record['embedder']['name']} counts the tokens of another "
                f"tokenizer ({expected[:12]}) than that of {corpus.folder} ({found[:12]}); prepare that with the "
                "tree's tokenizer, make a tree of its own, or make the tree with --embedder minilm, which reads text"
            )
    check_unaddressed(corpora, tree.fingerprint, force)
    leaves: dict[Path, dict[str, Leaves]] = {}
    unchanged = []
    with Pool(workers) as pool:
        for corpus in corpora:
            working = corpus.folder / WORKING
            clear_finished(working)
            there = None if force or working.exists() else stored_leaves(corpus.folder, corpus.manifest, tree.record)
            if there is not None:
                leaves[corpus.folder] = there
                unchanged.append(corpus.folder)
                continue
            plan = {"tree": tree.fingerprint, "data": corpus.fingerprint, "device": device}
            workspace = Workspace(working, pool, plan, force)
            leaves[corpus.folder] = {
                split: address_split(workspace, split, corpus, split, tree_folder, tree, device) for split in SPLITS
            }
            write_addresses(corpus.folder, corpus.manifest, tree.record, leaves[corpus.folder])
            workspace.remove()
    return Addressed(tree, leaves, tuple(unchanged))


def address_split(
    workspace: Workspace,
    stage: str,
    corpus: Corpus,
    split: str,
    tree_folder: Path,
    tree: ClusterTree,
    device: str,
) -> Leaves:
    """Leaves of a split by embedding and descent."""
    unit = Unit.parse(tree.record["unit"])
    chunks = corpus.chunks(split, unit, KINDS[tree.record["embedder"]["name"]].chunk_tokens)
    found = workspace.array(stage, (len(corpus.units(split, unit)),), np.int32)
    jobs = [AddressJob(chunk, tree_folder, device) for chunk in chunks]

    def keep(job: AddressJob, leaves: Leaves) -> None:
        found[job.chunk.start : job.chunk.stop] = leaves

    title = f"{corpus.folder.name}: {split} addresses"
    workspace.run(stage, title, jobs, address, keep, found, [chunk.tokens for chunk in chunks])
    return np.array(found)


def leaves_around(
    folder: Path,
    split: str,
    numbers: NDArray[np.int64],
    tree_folder: Path,
    blocked: Sequence[ClusterPath],
    own: NDArray[np.integer] | None = None,
    workers: int = 1,
) -> Leaves:
    """Leaves that units of a prepared folder have where clusters are blocked, from their own embeddings: int32 [units].
    Nothing is written.

    Args:
        numbers: [units] which of the split, ascending.
        blocked: clusters that may not be entered; the next nearest take their place.
        own: [units] the leaf of each, whose cluster of level 1 that unit may not enter either.

    Raises:
        UserError: the tree, or its embedder, is damaged.
    """
    try:
        tree = tree_with_embedder(tree_folder)
        embedder = read_embedder_record(tree_folder / EMBEDDER_FOLDER)["name"]
    except ValueError as error:
        raise UserError(str(error)) from None
    corpus, unit = Corpus.open(folder), Unit.parse(tree.record["unit"])
    lengths = corpus.units(split, unit).lengths
    jobs, weights, places = [], [], []
    for chunk in corpus.chunks(split, unit, KINDS[embedder].chunk_tokens // _SMALLER_CHUNKS):
        here = slice(*np.searchsorted(numbers, (chunk.start, chunk.stop)).tolist())
        if here.start == here.stop:
            continue
        leaves = None if own is None else own[here]
        jobs.append(AddressJob(chunk, tree_folder, "cpu", numbers[here] - chunk.start, tuple(blocked), leaves))
        weights.append(int(lengths[numbers[here]].sum()))
        places.append(here)
    found = np.empty(len(numbers), dtype=np.int32)
    title = f"{folder.name}: {split} addresses, clusters blocked"
    with Pool(workers) as pool, Progress(title, sum(weights)) as progress:
        for here, weight, leaves in zip(places, weights, pool.in_order(address, jobs, weights), strict=True):
            found[here] = leaves
            progress.advance(weight)
    return found
