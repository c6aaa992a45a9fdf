"""From prepared folders to a tree, and from a tree to addresses."""

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kmem.config import UserError
from kmem.data.cluster.corpus import SPLITS, Chunk, Corpus, check_one_tokenizer
from kmem.data.cluster.embedders import KINDS, EmbedderRequest, build_embedder
from kmem.data.cluster.jobs import AssignJob, Leaves, NodeJob, address, assign, cluster_name, embed, split_children
from kmem.data.cluster.tree_folder import write_tree
from kmem.data.cluster.typical_words import typical_words
from kmem.data.cluster.workspace import Pool, Workspace
from kmem.data.cluster_addresses import RECORD_FILE, stored_tree, write_addresses
from kmem.data.order import permutation
from kmem.data.units import Unit
from kmem.model.cluster_tree import (
    EMBEDDER_FOLDER,
    TREE_FILE,
    TREE_FORMAT,
    TREE_VERSION,
    ClusterTree,
    file_digest,
    read_tree_record,
)
from kmem.model.context_embedder import read_embedder_record

WORKING = ".clustering"
"""Ending of the folder in which a tree is made, beside it; name of that in which a prepared folder gets addresses."""
_LATER = ("children", "levels", "sample", "balance")
"""Choices that embeddings do not depend on."""
_UNITS_AT_A_TIME = 1 << 14


@dataclass(frozen=True)
class TreeRequest:
    """A tree to make, and the folders that it is made from and that get its addresses."""

    data: list[Path]
    out: Path
    children: int = 16
    levels: int = 2
    unit: Unit = field(default_factory=Unit)
    embedder: str = "tfidf"
    dim: int | None = None
    max_pieces: int = 8
    sample: int = 65_536
    """Units from which a node's centroids are made, at most."""
    balance: float = 1.5
    seed: int = 1234
    workers: int = 1
    device: str = "cpu"
    force: bool = False


@dataclass(frozen=True)
class Addressed:
    """What became of the data."""

    tree: ClusterTree
    leaves: dict[Path, dict[str, Leaves]]
    """Of each folder and split."""


def make_tree(request: TreeRequest) -> Addressed:
    """Fit a tree on the training splits and give the folders its addresses.

    Interrupted, it leaves a folder `OUT.clustering`, and the same request continues there.

    Raises:
        UserError: data that cannot be clustered so, or a result that is already there.
    """
    with Pool(request.workers) as pool:
        return _make_tree(request, pool)


def _make_tree(request: TreeRequest, pool: Pool) -> Addressed:
    _check_device(request.embedder, request.device)
    corpora = [Corpus.open(folder) for folder in request.data]
    check_one_tokenizer(corpora)
    kind = KINDS[request.embedder]
    chunks = [chunk for corpus in corpora for chunk in corpus.chunks("train", request.unit, kind.chunk_tokens)]
    units = sum(chunk.stop - chunk.start for chunk in chunks)
    _check_sizes(request, units)
    out = Path(os.path.abspath(request.out))
    workspace_folder = out.with_name(out.name + WORKING)
    plan = _plan(request, corpora)
    if not workspace_folder.exists():
        _check_replaceable(out, request.force)
        _check_unaddressed(corpora, None, request.force)
    workspace = Workspace(workspace_folder, pool, plan, request.force, later=_LATER)

    embedder_folder = workspace.folder / EMBEDDER_FOLDER
    if not (embedder_folder / "embedder.json").is_file():
        wanted = EmbedderRequest(corpora, request.unit, request.dim, request.seed, pool, request.max_pieces)
        build_embedder(request.embedder, wanted, embedder_folder)
    dim = read_embedder_record(embedder_folder)["dim"]
    embeddings = workspace.array("embeddings", (units, dim), np.float32)
    starts = np.cumsum([0] + [chunk.stop - chunk.start for chunk in chunks])
    embedding_jobs = [
        (chunk, embedder_folder, request.device, int(start)) for chunk, start in zip(chunks, starts, strict=False)
    ]

    def keep(job: tuple[Chunk, Path, str, int], vectors: NDArray[np.float32]) -> None:
        embeddings[job[3] : job[3] + len(vectors)] = vectors

    tokens = [chunk.tokens for chunk in chunks]
    workspace.run("embed", "embedding", embedding_jobs, embed, keep, embeddings, tokens)

    centroids, nodes = [], np.zeros(units, dtype=np.int32)
    for level in range(1, request.levels + 1):
        rows = _split_level(workspace, request, level, nodes, dim)
        nodes = _assign_level(workspace, request, level, nodes, rows, (units, dim))
        centroids.append(rows)

    tree_folder = workspace.folder / "tree"
    if not (tree_folder / TREE_FILE).is_file():
        sizes = np.bincount(nodes, minlength=request.children**request.levels)
        write_tree(tree_folder, centroids, sizes, embedder_folder, _described(request, corpora, nodes))
    tree = ClusterTree.load(tree_folder)
    # The descent of the finished tree is what gives addresses: training units have gone the same way, level by level.
    leaves: dict[Path, dict[str, Leaves]] = {}
    before = 0
    for number, corpus in enumerate(corpora):
        count = len(corpus.units("train", request.unit))
        stage = f"validation{number}"
        held_out = _address(workspace, stage, corpus, "validation", tree_folder, tree, request.device)
        leaves[corpus.folder] = {"train": nodes[before : before + count], "validation": held_out}
        before += count

    if not _holds(out, tree.fingerprint):
        _check_replaceable(out, request.force)
        shutil.rmtree(out, ignore_errors=True)
        copy = out.with_name(out.name + ".copying")
        shutil.copytree(tree_folder, copy, dirs_exist_ok=True)
        os.rename(copy, out)
    for corpus in corpora:
        write_addresses(corpus.folder, corpus.manifest, tree.record, leaves[corpus.folder])
    workspace.remove()
    return Addressed(tree, leaves)


def apply_tree(
    data: list[Path], tree_folder: Path, workers: int = 1, device: str = "cpu", force: bool = False
) -> Addressed:
    """Give prepared folders the addresses of a tree that is there.

    Interrupted, it leaves a folder `.clustering` in the prepared folder it was at, and the same call continues there.

    Raises:
        UserError: no such tree, a tree of another tokenizer, or folders with addresses of another tree.
    """
    corpora = [Corpus.open(folder) for folder in data]
    tree_folder = Path(os.path.abspath(tree_folder))
    try:
        tree = ClusterTree.load(tree_folder)
        _check_embedder(tree, tree_folder)
    except ValueError as error:
        raise UserError(f"--tree {error}") from None
    _check_device(tree.record["embedder"]["name"], device)
    for corpus in corpora:
        expected, found = tree.record["tokenizer"], corpus.manifest.tokenizer.fingerprint
        if expected is not None and expected != found:
            raise UserError(
                f"--tree {tree_folder}: its embedder {tree.record['embedder']['name']} counts the tokens of another "
                f"tokenizer ({expected[:12]}) than that of {corpus.folder} ({found[:12]}); prepare that with the "
                "tree's tokenizer, make a tree of its own, or make the tree with --embedder minilm, which reads text"
            )
    _check_unaddressed(corpora, tree.fingerprint, force)
    leaves: dict[Path, dict[str, Leaves]] = {}
    with Pool(workers) as pool:
        for corpus in corpora:
            plan = {"tree": tree.fingerprint, "data": corpus.fingerprint}
            workspace = Workspace(corpus.folder / WORKING, pool, plan, force)
            leaves[corpus.folder] = {
                split: _address(workspace, split, corpus, split, tree_folder, tree, device) for split in SPLITS
            }
            write_addresses(corpus.folder, corpus.manifest, tree.record, leaves[corpus.folder])
            workspace.remove()
    return Addressed(tree, leaves)


def _plan(request: TreeRequest, corpora: list[Corpus]) -> dict[str, Any]:
    """Everything that decides the result of make_tree."""
    return {
        "version": TREE_VERSION,
        "data": [corpus.fingerprint for corpus in corpora],
        "children": request.children,
        "levels": request.levels,
        "unit": str(request.unit),
        "embedder": request.embedder,
        "dim": request.dim,
        "max_pieces": request.max_pieces,
        "sample": request.sample,
        "balance": request.balance,
        "seed": request.seed,
        "device": request.device,
    }


def _described(request: TreeRequest, corpora: list[Corpus], leaves: Leaves) -> dict[str, Any]:
    """What tree.json says beside sizes and files."""
    reads_text = KINDS[request.embedder].reads_text
    first_level = leaves // request.children ** (request.levels - 1)
    return {
        "children": request.children,
        "levels": request.levels,
        "unit": str(request.unit),
        "tokenizer": None if reads_text else corpora[0].manifest.tokenizer.fingerprint,
        "corpora": [corpus.fingerprint for corpus in corpora],
        "settings": {"sample": request.sample, "balance": request.balance, "seed": request.seed},
        "words": typical_words(corpora, request.unit, first_level, request.children, request.seed),
    }


def _holds(folder: Path, tree: str) -> bool:
    """Whether the folder holds that tree, finished."""
    try:
        return bool(read_tree_record(folder)["fingerprint"] == tree)
    except ValueError:
        return False


def _check_device(embedder: str, device: str) -> None:
    if device == "cpu":
        return
    if not KINDS[embedder].reads_text:
        raise UserError(f"--device {device}: the embedder {embedder} computes on the CPU; leave it out")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: not usable here ({str(error).splitlines()[0]}); leave it out") from None


def _check_sizes(request: TreeRequest, units: int) -> None:
    leaves = request.children**request.levels
    if leaves > np.iinfo(np.int32).max:
        raise UserError(f"--children {request.children} --levels {request.levels}: more leaves than 2^31")
    if units < leaves:
        smaller = "" if request.unit.window else ", or cut documents with --unit window:N"
        raise UserError(
            f"--children {request.children} --levels {request.levels}: {leaves:,} leaves, but the training split has "
            f"{units:,} units, and a leaf without any would never be trained; use fewer children or levels{smaller}"
        )


def _check_replaceable(out: Path, force: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        is_tree = json.loads((out / TREE_FILE).read_text(encoding="utf-8")).get("format") == TREE_FORMAT
    except (OSError, ValueError, AttributeError):
        is_tree = False
    if not is_tree:
        raise UserError(f"--out {out}: exists and holds something else than a tree; choose another folder")
    if not force:
        raise UserError(f"--out {out}: a tree is there; use it with --tree {out}, or replace it with --force")


def _check_unaddressed(corpora: list[Corpus], tree: str | None, force: bool) -> None:
    for corpus in corpora:
        found = stored_tree(corpus.folder)
        if found is not None and found != tree and not force:
            raise UserError(
                f"{corpus.folder / RECORD_FILE}: the folder has addresses of another tree ({found[:12]}); replace them "
                "with --force, or copy the folder"
            )


def _check_embedder(tree: ClusterTree, folder: Path) -> None:
    for name, digest in tree.record["embedder"]["files"].items():
        path = folder / EMBEDDER_FOLDER / name
        if not path.is_file() or file_digest(path) != digest:
            raise ValueError(f"{path}: missing, or not the file that the tree was made with; copy the tree again")


def _split_level(workspace: Workspace, request: TreeRequest, level: int, nodes: Leaves, dim: int) -> Any:
    """Centroids of a level: [k^level, D]. Jobs are the nodes of the level above."""
    k, parents = request.children, request.children ** (level - 1)
    rows = workspace.array(f"centroids{level}", (parents * k, dim), np.float32)
    members = np.argsort(nodes, kind="stable")
    bounds = np.searchsorted(nodes[members], np.arange(parents + 1))
    jobs = []
    for node in range(parents):
        inside = members[bounds[node] : bounds[node + 1]]
        name = cluster_name(node, level - 1, k)
        if len(inside) < k:
            raise UserError(
                f"{name} (level {level - 1}): {len(inside):,} units cannot fill {k} children; use fewer --children or "
                "--levels, or smaller units"
            )
        drawn = permutation(request.seed, f"{level}/{node}", 0, "sample", len(inside))
        chosen = np.sort(inside[drawn[: request.sample]])
        # Every child needs k^(levels below it) units; of a sample, its share of them.
        needed = max(round(k ** (request.levels - level) * len(chosen) / len(inside)), 1)
        path = workspace.folder / "embeddings.array"
        jobs.append(NodeJob(path, (len(nodes), dim), chosen, k, request.balance, needed, request.seed, level, node))

    def keep(job: NodeJob, centroids: NDArray[np.float32]) -> None:
        rows[job.node * k : (job.node + 1) * k] = centroids

    sizes = [len(job.chosen) for job in jobs]
    workspace.run(f"split{level}", f"level {level}: centroids", jobs, split_children, keep, rows, sizes)
    return rows


def _assign_level(
    workspace: Workspace, request: TreeRequest, level: int, nodes: Leaves, centroids: Any, shape: tuple[int, int]
) -> Any:
    """The cluster of each unit on a level, one step below its node."""
    found = workspace.array(f"clusters{level}", (shape[0],), np.int32)
    jobs = [
        AssignJob(workspace.folder, shape, level, request.children, start, min(start + _UNITS_AT_A_TIME, shape[0]))
        for start in range(0, shape[0], _UNITS_AT_A_TIME)
    ]

    def keep(job: AssignJob, clusters: Leaves) -> None:
        found[job.start : job.stop] = clusters

    workspace.run(f"assign{level}", f"level {level}: clusters", jobs, assign, keep, found)
    sizes = np.bincount(found, minlength=request.children**level)
    if sizes.min() == 0:
        name = cluster_name(int(sizes.argmin()), level, request.children)
        raise UserError(f"{name} (level {level}) is empty; use fewer --children or --levels")
    return found


def _address(
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
