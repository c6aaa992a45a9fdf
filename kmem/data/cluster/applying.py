"""Addresses of prepared folders from a tree that is there."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kmem.config import UserError
from kmem.data.cluster.checks import check_device, check_embedder_files, check_unaddressed
from kmem.data.cluster.corpus import SPLITS, Chunk, Corpus, open_corpora
from kmem.data.cluster.embedders import KINDS
from kmem.data.cluster.jobs import Leaves, address
from kmem.data.cluster.workspace import Pool, Workspace, clear_finished
from kmem.data.cluster_addresses import stored_leaves, write_addresses
from kmem.data.units import Unit
from kmem.model.cluster_tree import ClusterTree

WORKING = ".clustering"
"""Folder in which a prepared folder gets addresses; ending of the one beside a tree in which that is made."""


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
        tree = ClusterTree.load(tree_folder)
        check_embedder_files(tree, tree_folder)
    except ValueError as error:
        raise UserError(f"--tree {error}") from None
    check_device(tree.record["embedder"]["name"], device)
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
    jobs = [(chunk, tree_folder, device, chunk.start) for chunk in chunks]

    def keep(job: tuple[Chunk, Path, str, int], leaves: Leaves) -> None:
        found[job[3] : job[3] + len(leaves)] = leaves

    title = f"{corpus.folder.name}: {split} addresses"
    workspace.run(stage, title, jobs, address, keep, found, [chunk.tokens for chunk in chunks])
    return np.array(found)
