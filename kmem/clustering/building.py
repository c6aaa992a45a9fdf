"""Make a tree from prepared folders, and give the folders their addresses."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from kmem.clustering.applying import WORKING, Addressed, address_split, check_device, check_unaddressed
from kmem.clustering.corpus import Corpus, open_corpora
from kmem.clustering.embedders import DEFAULT_KIND, KINDS, EmbedderRequest, OptionValue, build_embedder, check_options
from kmem.clustering.jobs import Leaves, NodeJob, assign, embed, node_name, split_children
from kmem.clustering.tree_folder import copy_tree, write_tree
from kmem.clustering.typical_words import typical_words
from kmem.clustering.workspace import Pool, Workspace, clear_finished
from kmem.config import UserError
from kmem.data.bank_addresses import write_addresses
from kmem.data.order import permutation
from kmem.data.tokenizer import check_one_tokenizer
from kmem.data.units import Unit
from kmem.files import atomic_folder, check_replaceable, has_format
from kmem.model.bank_embedder import EMBEDDER_FILE, read_embedder_record
from kmem.model.bank_tree import EMBEDDER_FOLDER, TREE_FILE, TREE_FORMAT, TREE_VERSION, ClusterTree, read_tree_record
from kmem.wording import counted

_LATER = ("children", "levels", "sample", "balance")
"""Options that embeddings do not depend on."""
_UNITS_AT_A_TIME = 1 << 14


@dataclass(frozen=True)
class TreeRequest:
    """A tree to make. The folders in `data` are what it is made from, and they get its addresses."""

    data: list[Path]
    out: Path
    children: int = 16
    levels: int = 2
    unit: Unit = field(default_factory=Unit)
    embedder: str = DEFAULT_KIND
    options: Mapping[str, OptionValue] = field(default_factory=dict)
    """Options of the embedder that differ from its defaults; kmem.clustering.embedders lists those of each kind."""
    sample: int = 65_536
    """Most units that a node's centroids are made from."""
    balance: float = 1.5
    seed: int = 1234
    workers: int = 1
    device: str = "cpu"
    force: bool = False


def make_tree(request: TreeRequest) -> Addressed:
    """Fit a tree to the training splits and give the folders its addresses.

    An interruption leaves a folder `OUT.clustering`, and the same request continues there.

    Raises:
        UserError: the data cannot be clustered in this way, or a result is already there.
    """
    check_options(request.embedder, request.options)
    with Pool(request.workers) as pool:
        return _make_tree(request, pool)


def _make_tree(request: TreeRequest, pool: Pool) -> Addressed:
    check_device(request.embedder, request.device)
    corpora = open_corpora(request.data)
    check_one_tokenizer("--data", request.data, [corpus.manifest for corpus in corpora])
    kind = KINDS[request.embedder]
    chunks = [chunk for corpus in corpora for chunk in corpus.chunks("train", request.unit, kind.chunk_tokens)]
    counts = [chunk.stop - chunk.start for chunk in chunks]
    units = sum(counts)
    _check_sizes(request, units)
    out = Path(os.path.abspath(request.out))
    working = out.with_name(out.name + WORKING)
    clear_finished(working)
    if not working.exists():
        _check_no_tree(out, request.force)
        check_unaddressed(corpora, None, request.force)
    plan = _plan(request, corpora)
    workspace = Workspace(working, pool, plan, request.force, later=_LATER, kept=("count", "embeddings"))

    embedder_folder = workspace.folder / EMBEDDER_FOLDER
    if not (embedder_folder / EMBEDDER_FILE).is_file():
        wanted = EmbedderRequest(corpora, request.unit, request.options, request.seed, workspace)
        try:
            build_embedder(request.embedder, wanted, embedder_folder)
        except UserError:
            workspace.remove()  # otherwise it would be in the way of another embedder
            raise
    dim = read_embedder_record(embedder_folder)["dim"]
    embeddings = workspace.array("embeddings", (units, dim), np.float32)
    tokens = [chunk.tokens for chunk in chunks]
    embed_chunk = partial(embed, embedder_folder, request.device)
    workspace.run("embeddings", "embedding", chunks, embed_chunk, embeddings, counts, tokens)

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
    # Addresses come from a descent of the finished tree. Training units have already descended it, level by level.
    leaves: dict[Path, dict[str, Leaves]] = {}
    before = 0
    for number, corpus in enumerate(corpora):
        count = len(corpus.units("train", request.unit))
        stage = f"validation{number}"
        held_out = address_split(workspace, stage, corpus, "validation", tree_folder, tree, request.device)
        leaves[corpus.folder] = {"train": nodes[before : before + count], "validation": held_out}
        before += count

    if not _holds(out, tree.fingerprint):
        _check_no_tree(out, request.force)
        with atomic_folder(out, replace=True) as copy:
            copy_tree(tree_folder, copy)
    check_unaddressed(corpora, tree.fingerprint, request.force)  # another tree may have been applied meanwhile
    for corpus in corpora:
        write_addresses(corpus.folder, corpus.manifest, tree.record, leaves[corpus.folder])
    workspace.remove()
    return Addressed(tree, leaves)


def _check_sizes(request: TreeRequest, units: int) -> None:
    """
    Raises:
        UserError: this many units, or the sample of a node, cannot fill the tree.
    """
    if request.sample < request.children:
        raise UserError(
            f"--sample {request.sample}: too few units of a node to make its {request.children} children (--children); "
            f"take at least {request.children}, better some hundreds per child"
        )
    leaves = request.children**request.levels
    if leaves > np.iinfo(np.int32).max:
        raise UserError(
            f"--children {request.children} --levels {request.levels}: more than 2^31 leaves; use fewer of either"
        )
    if units < leaves:
        smaller = "" if request.unit.window else ", or cut documents with --unit window:N"
        raise UserError(
            f"--children {request.children} --levels {request.levels}: {leaves:,} leaves, but the training split has "
            f"{counted(units, 'unit')}, and a leaf without units would never be trained; use fewer children or "
            f"levels{smaller}"
        )


def _check_no_tree(out: Path, force: bool) -> None:
    """
    Raises:
        UserError: the folder holds something other than a tree, or a tree that may not be replaced.
    """
    is_tree = has_format(out / TREE_FILE, TREE_FORMAT)
    check_replaceable(out, "a tree", is_tree, force, instead=f"use it with --tree {out}")


def _plan(request: TreeRequest, corpora: list[Corpus]) -> dict[str, Any]:
    """Everything that decides the result of make_tree."""
    options: dict[str, OptionValue | str | None] = {}
    for option in KINDS[request.embedder].options:
        value = request.options.get(option.name)
        options[option.name] = value if value is None or option.identity is None else option.identity(value)
    named = ("children", "levels", "embedder", "sample", "balance", "seed", "device")
    plan = {
        "version": TREE_VERSION,
        "data": [corpus.fingerprint for corpus in corpora],
        "unit": str(request.unit),
        **{name: getattr(request, name) for name in named},
    }
    assert not plan.keys() & options.keys(), f"an option of the embedder {request.embedder} has the name of a tree's"
    return {**plan, **options}


def _described(request: TreeRequest, corpora: list[Corpus], leaves: Leaves) -> dict[str, Any]:
    """The entries of tree.json besides sizes and files."""
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
    """Whether the folder holds the complete tree with this fingerprint."""
    try:
        return bool(read_tree_record(folder)["fingerprint"] == tree)
    except ValueError:
        return False


def _split_level(workspace: Workspace, request: TreeRequest, level: int, nodes: Leaves, dim: int) -> Any:
    """Centroids of a level: float32 [k^level, D]. Each node of the level above is a job."""
    k, parents = request.children, request.children ** (level - 1)
    stage = f"centroids{level}"
    rows = workspace.array(stage, (parents * k, dim), np.float32)
    members = np.argsort(nodes, kind="stable")
    bounds = np.searchsorted(nodes[members], np.arange(parents + 1))
    jobs = []
    for node in range(parents):
        inside = members[bounds[node] : bounds[node + 1]]
        if len(inside) < k:
            raise UserError(
                f"{node_name(node, level - 1, k)} (level {level - 1}): its {counted(len(inside), 'unit')} cannot fill "
                f"{k} children; use fewer --children or --levels, or smaller units"
            )
        drawn = permutation(request.seed, f"{level}/{node}", 0, "sample", len(inside))
        chosen = np.sort(inside[drawn[: request.sample]])
        # Every child needs k^(levels below it) units, or in a sample the same share of them.
        needed = max(round(k ** (request.levels - level) * len(chosen) / len(inside)), 1)
        jobs.append(NodeJob(node, chosen, needed))

    sizes = [len(job.chosen) for job in jobs]
    split = partial(split_children, workspace.folder, (len(nodes), dim), level, k, request.balance, request.seed)
    workspace.run(stage, f"level {level}: centroids", jobs, split, rows, [k] * parents, sizes)
    return rows


def _assign_level(
    workspace: Workspace, request: TreeRequest, level: int, nodes: Leaves, centroids: Any, shape: tuple[int, int]
) -> Any:
    """The cluster of each unit on a level, a child of the unit's node: int32 [units]."""
    stage = f"clusters{level}"
    assigned = workspace.array(stage, (shape[0],), np.int32)
    units = range(shape[0])
    jobs = [units[start : start + _UNITS_AT_A_TIME] for start in units[::_UNITS_AT_A_TIME]]
    assign_units = partial(assign, workspace.folder, shape, level, request.children)
    workspace.run(stage, f"level {level}: clusters", jobs, assign_units, assigned, list(map(len, jobs)))
    # split_node gives every child a unit of the sample, and the same descent assigned that unit here.
    assert np.bincount(assigned, minlength=request.children**level).min() > 0
    return assigned
