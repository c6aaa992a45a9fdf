"""The jobs of worker processes: embed units, split nodes into centroids, assign units to the nearest centroid."""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kmem.clustering.corpus import Chunk, read_chunk
from kmem.clustering.embedders import KINDS
from kmem.clustering.splitting import split_node
from kmem.data.tokenizer import load_tokenizer
from kmem.model.bank_embedder import ContextEmbedder, load_embedder, read_embedder_record
from kmem.model.bank_router import descend_elsewhere
from kmem.model.bank_tree import (
    EMBEDDER_FOLDER,
    TREE_FILE,
    ClusterPath,
    ClusterTree,
    format_path,
    nearest_children,
    path_of,
)
from kmem.model.file_digest import file_digest
from kmem.model.one_thread import with_one_thread

Leaves = NDArray[np.int32]


@dataclass(frozen=True)
class NodeJob:
    """A node to split."""

    node: int
    chosen: NDArray[np.int64]
    """[units] the units that are read."""
    needed: int
    """Units that each child must have."""


@dataclass(frozen=True)
class AddressJob:
    """Units of a chunk, which are to be assigned to leaves."""

    chunk: Chunk
    tree: Path
    device: str = "cpu"
    chosen: NDArray[np.int64] | None = None
    """[units] indices of the units in the chunk; None: all."""
    blocked: tuple[ClusterPath, ...] = ()
    """Clusters that may not be entered."""
    own: NDArray[np.integer] | None = None
    """[units] the leaf of each unit; a unit may not enter the level-1 cluster of its own leaf either."""


def split_children(
    folder: Path, shape: tuple[int, int], level: int, children: int, balance: float, seed: int, job: NodeJob
) -> NDArray[np.float32]:
    """Centroids of a node's children: float32 [children, D]. Other arguments are as in `assign`."""
    vectors = np.memmap(folder / "embeddings.array", dtype=np.float32, mode="r", shape=shape)[job.chosen]
    digest = hashlib.blake2b(f"{seed}/{level}/{job.node}".encode(), digest_size=4).digest()
    name = node_name(job.node, level - 1, children)
    return split_node(np.asarray(vectors), children, balance, job.needed, int.from_bytes(digest, "little"), name)


def assign(folder: Path, shape: tuple[int, int], level: int, children: int, units: range) -> Leaves:
    """The nearest child of each unit's node: int32 [units], numbered on the children's level.

    Args:
        folder: of the workspace.
        shape: of all embeddings, [all units, D].
    """

    def mapped(name: str, dtype: Any, shape: tuple[int, ...]) -> Any:
        return np.memmap(folder / f"{name}.array", dtype=dtype, mode="r", shape=shape)

    rows = mapped("embeddings", np.float32, shape)[units.start : units.stop]
    centroids = mapped(f"centroids{level}", np.float32, (children**level, shape[1]))
    if level == 1:
        nodes = np.zeros(len(rows), dtype=np.int64)
    else:
        nodes = mapped(f"clusters{level - 1}", np.int32, shape[:1])[units.start : units.stop].astype(np.int64)
    nearest = nearest_children(
        torch.from_numpy(np.array(rows)),
        torch.from_numpy(nodes),
        torch.from_numpy(np.array(centroids)),
        children,
    )
    return nearest.numpy().astype(np.int32)


def embed(embedder: Path, device: str, chunk: Chunk) -> NDArray[np.float32]:
    """Embeddings of a chunk: float32 [units, D]."""
    return _embedded(chunk, embedder, device).numpy()


def address(job: AddressJob) -> Leaves:
    """Leaves of units of a chunk: int32 [units]."""
    tree = _tree(job.tree, file_digest(job.tree / TREE_FILE))
    embeddings = _embedded(job.chunk, job.tree / EMBEDDER_FOLDER, job.device, job.chosen)
    if job.own is None:
        leaves = tree.descend(embeddings, job.blocked)
    else:
        leaves = descend_elsewhere(tree, embeddings, job.blocked, torch.from_numpy(job.own.astype(np.int64)))
    return leaves.numpy().astype(np.int32)


def _embedded(chunk: Chunk, embedder: Path, device: str, chosen: NDArray[np.int64] | None = None) -> torch.Tensor:
    # The identity of the embedder's files: a process may make several trees in one place.
    files = sorted(path for path in embedder.rglob("*") if path.is_file())
    identity = tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files)
    loaded = _embedder(embedder, identity, chunk.folder / "tokenizer", device)
    # A worker per core; besides, the rounding of matrix products depends on the threads.
    return with_one_thread(lambda: loaded.embed(read_chunk(chunk, chosen)))


@lru_cache(maxsize=2)
def _embedder(folder: Path, identity: object, tokenizer: Path, device: str) -> ContextEmbedder:
    kind = KINDS[read_embedder_record(folder)["name"]]
    return load_embedder(folder, load_tokenizer(tokenizer) if kind.reads_text else None, device)


@lru_cache(maxsize=2)
def _tree(folder: Path, identity: str) -> ClusterTree:
    return ClusterTree.load(folder)


def node_name(cluster: int, level: int, children: int) -> str:
    """The name of a cluster in messages; level 0 is the root."""
    return f"cluster {format_path(path_of(cluster, level, children))}" if level else "the corpus"
