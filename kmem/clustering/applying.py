"""Give prepared folders the addresses of an existing tree."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from kmem.clustering.corpus import SPLITS, Corpus, open_corpora
from kmem.clustering.embedders import KINDS
from kmem.clustering.jobs import AddressJob, Leaves, address
from kmem.clustering.workspace import Pool, Workspace, clear_finished
from kmem.config import UserError
from kmem.data.bank_addresses import RECORD_FILE, read_addresses, stored_tree, write_addresses
from kmem.data.indexed import IndexedTokens
from kmem.data.progress import Progress
from kmem.data.units import Unit
from kmem.model.bank_embedder import read_embedder_record
from kmem.model.bank_router import tree_with_embedder
from kmem.model.bank_tree import EMBEDDER_FOLDER, ClusterPath, ClusterTree

WORKING = ".clustering"
"""Name of the working folder inside a prepared folder, and suffix of the working folder beside a new tree."""

_SMALLER_CHUNKS = 16
"""Factor by which chunks are smaller if their results stay in host memory: a whole held-out split may be one chunk, and
progress should move and all workers have work."""


@dataclass(frozen=True)
class Addressed:
    """The addresses of prepared folders."""

    tree: ClusterTree
    leaves: dict[Path, dict[str, Leaves]]
    """Folder -> split -> int32 [units]."""
    unchanged: tuple[Path, ...] = ()
    """Folders that already had these addresses."""


def apply_tree(
    data: list[Path], tree_folder: Path, workers: int = 1, device: str = "cpu", force: bool = False
) -> Addressed:
    """Give prepared folders the addresses of an existing tree; folders that already have them are not changed.

    An interruption leaves a folder `.clustering` in the prepared folder that was being worked on, and the same call
    continues there.

    Args:
        data: the prepared folders.
        tree_folder: folder of the tree.
        workers: number of processes.
        device: where an encoder computes.
        force: replace addresses of another tree, and compute addresses of this tree anew.

    Raises:
        UserError: there is no such tree, it was made with another tokenizer, or a folder has addresses of another tree.
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
        expected, actual = tree.record["tokenizer"], corpus.manifest.tokenizer.fingerprint
        if expected is not None and expected != actual:
            raise UserError(
                f"--tree {tree_folder}: its embedder {tree.record['embedder']['name']} counts the tokens of another "
                f"tokenizer ({expected[:12]}) than the one of {corpus.folder} ({actual[:12]}); prepare this folder "
                "with the tree's tokenizer, make a tree for it, or make the tree with --embedder minilm, which reads "
                "text"
            )
    check_unaddressed(corpora, tree.fingerprint, force)
    leaves: dict[Path, dict[str, Leaves]] = {}
    unchanged = []
    with Pool(workers) as pool:
        for corpus in corpora:
            working = corpus.folder / WORKING
            clear_finished(working)
            stored = None if force or working.exists() else _stored_leaves(corpus, tree_folder)
            if stored is not None:
                leaves[corpus.folder] = stored
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


def check_device(embedder: str, device: str) -> None:
    """
    Raises:
        UserError: the embedder does not use this device, or it is not available.
    """
    if device == "cpu":
        return
    if not KINDS[embedder].reads_text:
        raise UserError(f"--device {device}: the embedder {embedder} computes on the CPU; leave it out")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: not usable here ({str(error).splitlines()[0]}); leave it out") from None


def check_unaddressed(corpora: list[Corpus], tree: str | None, force: bool) -> None:
    """
    Raises:
        UserError: a folder has addresses of a tree with another fingerprint, and they may not be replaced.
    """
    for corpus in corpora:
        stored = stored_tree(corpus.folder)
        if stored is not None and stored != tree and not force:
            raise UserError(
                f"{corpus.folder / RECORD_FILE}: the folder has addresses of another tree ({stored[:12]}); replace "
                "them with --force, or use a copy of the folder"
            )


def _stored_leaves(corpus: Corpus, tree_folder: Path) -> dict[str, Leaves] | None:
    """The addresses of both splits, int32 [units]; None unless they are undamaged and belong to this tree and data."""
    leaves = {}
    for split in SPLITS:
        indexed = IndexedTokens.of_split(corpus.folder, corpus.manifest, split)
        try:
            leaves[split] = read_addresses(
                corpus.folder, corpus.manifest, split, indexed.starts, indexed.lengths, tree_folder
            ).leaves
        except UserError:
            return None
    return leaves


def address_split(
    workspace: Workspace,
    stage: str,
    corpus: Corpus,
    split: str,
    tree_folder: Path,
    tree: ClusterTree,
    device: str,
) -> Leaves:
    """Embed the units of a split and descend the tree: the leaf of each unit, int32 [units].

    Args:
        stage: name of the stage in the workspace.
    """
    unit = Unit.parse(tree.record["unit"])
    chunks = corpus.chunks(split, unit, KINDS[tree.record["embedder"]["name"]].chunk_tokens)
    all_leaves = workspace.array(stage, (len(corpus.units(split, unit)),), np.int32)
    jobs = [AddressJob(chunk, tree_folder, device) for chunk in chunks]
    rows = [chunk.stop - chunk.start for chunk in chunks]
    title = f"{corpus.folder.name}: {split} addresses"
    workspace.run(stage, title, jobs, address, all_leaves, rows, [chunk.tokens for chunk in chunks])
    return np.array(all_leaves)


def leaves_around(
    folder: Path,
    split: str,
    numbers: NDArray[np.int64],
    tree_folder: Path,
    blocked: Sequence[ClusterPath],
    own: NDArray[np.integer] | None = None,
    workers: int = 1,
) -> Leaves:
    """The leaves that units of a prepared folder get from their own embeddings if clusters are blocked: int32 [units].
    Nothing is written.

    Args:
        numbers: [units] their numbers in the split, ascending.
        blocked: clusters that may not be entered; the next nearest take their place.
        own: [units] the leaf of each unit; a unit may not enter the level-1 cluster of its own leaf either.

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
    all_leaves = np.empty(len(numbers), dtype=np.int32)
    title = f"{folder.name}: {split} addresses, clusters blocked"
    with Pool(workers) as pool, Progress(title, sum(weights)) as progress:
        for here, weight, leaves in zip(places, weights, pool.weighed(address, jobs, weights), strict=True):
            all_leaves[here] = leaves
            progress.advance(weight)
    return all_leaves
