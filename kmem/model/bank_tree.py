"""The cluster of a context: greedy descent of a tree of centroids (hierarchical memories, arXiv 2510.02375, section 3).

A tree has k children per node and p levels. Clusters of level l (1..p) are numbered 0..k^l - 1 in descent order, so the
children of cluster n are the clusters n*k .. n*k + k-1 of the next level, and a leaf's cluster on level l is
leaf // k^(p-l). A path names a cluster by the children taken from the root: (3, 7) is cluster 3*k + 7 of level 2.

Shape letters: N contexts, K children of a node, D embedding dimension.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .file_digest import file_digest

TREE_FILE, CENTROIDS_FILE, EMBEDDER_FOLDER = "tree.json", "tree.safetensors", "embedder"
TREE_FORMAT, TREE_VERSION = "kmem-cluster-tree", 1

ClusterPath = tuple[int, ...]

_DISTANCES_AT_ONCE = 1 << 21
"""Number of float64 differences held at once: 16 MB, which fits a CPU's caches."""


@dataclass(frozen=True)
class ClusterTree:
    """The centroids of every level, and the contents of tree.json."""

    centroids: tuple[Tensor, ...]
    """Entry l - 1 holds level l (from 1): float32 [k^l, D]."""
    record: Mapping[str, Any]
    """Contents of tree.json."""

    @classmethod
    def load(cls, folder: str | Path) -> "ClusterTree":
        """The tree of a folder written by `kmem data cluster`.

        Raises:
            ValueError: it is missing, unfinished, damaged, or has another format; names the file and the remedy.
        """
        from safetensors.torch import load_file  # Transformers requires it

        folder = Path(folder)
        record = read_tree_record(folder)
        path = folder / CENTROIDS_FILE
        if not path.is_file() or file_digest(path) != record["files"][CENTROIDS_FILE]:
            raise ValueError(f"{path}: missing, or not the file that {TREE_FILE} describes; copy the tree again")
        tensors = load_file(str(path))
        k, levels, dim = record["children"], record["levels"], record["embedder"]["dim"]
        centroids = tuple(tensors[f"level{level}"] for level in range(1, levels + 1))
        for level, rows in enumerate(centroids, 1):
            if rows.shape != (k**level, dim) or rows.dtype != torch.float32:
                raise ValueError(f"{path}: level{level} is not float32 [{k**level}, {dim}], as {TREE_FILE} states")
        return cls(centroids, record)

    @property
    def children(self) -> int:
        """Children of each node, k."""
        return int(self.record["children"])

    @property
    def levels(self) -> int:
        """Levels below the root, p."""
        return int(self.record["levels"])

    @property
    def leaves(self) -> int:
        """Number of leaves, k^p."""
        return self.children**self.levels

    @property
    def dim(self) -> int:
        """Dimension of the embeddings, D."""
        return self.centroids[0].shape[1]

    @property
    def fingerprint(self) -> str:
        """Identity of the tree and its embedder: equal fingerprints give equal addresses."""
        return str(self.record["fingerprint"])

    def descend(self, embeddings_ND: Tensor, blocked: Iterable[ClusterPath] = ()) -> Tensor:
        """The leaf of each context: int64 [N], on the device of the embeddings.

        Each level takes the nearest child by L2 distance, and the lowest number among equally near ones. Embeddings and
        centroids are float32. Distances are summed in float64, separately per context, so the choice between near
        neighbours depends neither on the other contexts of the call nor on the device.

        Args:
            embeddings_ND: float32, N may be 0.
            blocked: paths of clusters that may not be entered. If the nearest child is blocked, or everything below it
                is, the next nearest is taken.

        Raises:
            ValueError: the embeddings have another dimension, or everything is blocked.
        """
        if embeddings_ND.dtype != torch.float32 or embeddings_ND.dim() != 2 or embeddings_ND.shape[1] != self.dim:
            raise ValueError(
                f"embeddings are {embeddings_ND.dtype} {list(embeddings_ND.shape)}, but the tree needs float32 "
                f"[N, {self.dim}]: use the embedder of the tree"
            )
        barred = self._barred(blocked)
        node_N = torch.zeros(len(embeddings_ND), dtype=torch.int64, device=embeddings_ND.device)
        for level, centroids in enumerate(self.centroids):
            node_N = nearest_children(
                embeddings_ND, node_N, centroids, self.children, None if barred is None else barred[level]
            )
        return node_N

    def detour(self, leaves: Tensor, blocked: Iterable[ClusterPath]) -> Tensor:
        """Reroute leaves that lie in blocked clusters; int64 of the same shape.

        This is for addresses of data whose embeddings are not available. Above its first blocked cluster, a leaf keeps
        its path. From there on, the centroid of the leaf descends in place of the embedding. Negative numbers are not
        leaves and stay unchanged.

        Raises:
            ValueError: as `descend`.
        """
        barred = self._barred(blocked)
        if barred is None:
            return leaves
        distinct, places = leaves.unique(return_inverse=True)
        old_leaves = distinct[distinct >= 0]
        centroids_ND = self.centroids[-1][old_leaves.cpu()].to(leaves.device)
        node, diverted = torch.zeros_like(old_leaves), torch.zeros_like(old_leaves, dtype=torch.bool)
        for level, (centroids, closed) in enumerate(zip(self.centroids, barred, strict=True), 1):
            cluster = self.level_ids(old_leaves, level)
            diverted |= closed.to(leaves.device)[cluster]
            cluster[diverted] = nearest_children(
                centroids_ND[diverted], node[diverted], centroids, self.children, closed
            )
            node = cluster
        distinct[distinct >= 0] = node
        return distinct[places]

    def blocked_leaves(self, blocked: Iterable[ClusterPath]) -> Tensor:
        """bool [k^p]: True for leaves that become unreachable when these clusters are blocked.

        Raises:
            ValueError: as `descend`.
        """
        closed = torch.zeros(self.leaves, dtype=torch.bool)
        for level, barred in enumerate(self._barred(blocked) or (), 1):
            closed |= barred.repeat_interleave(self.children ** (self.levels - level))
        return closed

    def check_blocked(self, blocked: Iterable[ClusterPath]) -> None:
        """Refuse paths of clusters that cannot be blocked.

        Raises:
            ValueError: a cluster does not exist, or no cluster would be left.
        """
        self._barred(blocked)

    def level_ids(self, leaves: Tensor, level: int) -> Tensor:
        """The clusters of a level (1..p) that the leaves belong to; int64 of the same shape."""
        return level_ids(leaves, level, self.children, self.levels)

    def _barred(self, blocked: Iterable[ClusterPath]) -> list[Tensor] | None:
        """For each level, bool [k^l]: True for clusters that are blocked or whose children are all blocked; None if
        nothing is blocked."""
        clusters = [cluster_of(tuple(path), self.children, self.levels) for path in blocked]
        if not clusters:
            return None
        barred = [torch.zeros(self.children**level, dtype=torch.bool) for level in range(1, self.levels + 1)]
        for level, number in clusters:
            barred[level - 1][number] = True
        for upper, lower in zip(reversed(barred[:-1]), reversed(barred[1:]), strict=True):
            upper |= lower.view(-1, self.children).all(dim=1)
        if bool(barred[0].all()):
            raise ValueError("every cluster of the tree is blocked; leave one open")
        return barred


def nearest_children(
    embeddings_ND: Tensor, node_N: Tensor, centroids: Tensor, children: int, barred: Tensor | None = None
) -> Tensor:
    """One step of the descent: the nearest child of each context's node; int64 [N], numbers on the children's level.

    Args:
        embeddings_ND: float32.
        node_N: int64, a cluster of the level above, 0 for the root.
        centroids: float32 [nodes * children, D].
        barred: bool [nodes * children], True for children that may not be taken; every node in `node_N` must have at
            least one open child.
    """
    dim = centroids.shape[1]
    centroids_nKD = centroids.to(embeddings_ND.device).view(-1, children, dim)
    barred_nK = None if barred is None else barred.to(embeddings_ND.device).view(-1, children)
    nearest = torch.empty_like(node_N)
    step = max(_DISTANCES_AT_ONCE // (children * dim), 1)
    for start in range(0, len(node_N), step):
        chunk = slice(start, start + step)
        node = node_N[chunk]
        difference = centroids_nKD[node].double().sub_(embeddings_ND[chunk, None].double())
        distance = difference.square_().sum(dim=-1)
        if barred_nK is not None:
            distance.masked_fill_(barred_nK[node], torch.inf)
        # torch.argmin returns the first of several minima.
        nearest[chunk] = node * children + distance.argmin(dim=-1)
    return nearest


def level_ids(leaves: Tensor, level: int, children: int, levels: int) -> Tensor:
    """The clusters of a level (1..levels) that the leaves belong to: leaf // k^(p - l)."""
    assert 1 <= level <= levels, f"level {level} of a tree of {levels}"
    return leaves.div(children ** (levels - level), rounding_mode="floor")


def path_of(cluster: int, level: int, children: int) -> ClusterPath:
    """The path of a cluster of a level (1 or deeper): the children taken from the root down to it."""
    return tuple(cluster // children ** (level - 1 - part) % children for part in range(level))


def cluster_of(path: ClusterPath, children: int, levels: int) -> tuple[int, int]:
    """Level and number of the cluster that a path names, the inverse of `path_of`.

    Raises:
        ValueError: the path is empty, longer than the tree is deep, or names a child that does not exist.
    """
    shown = format_path(path)
    if not 1 <= len(path) <= levels:
        likely = format_path((children - 1,) * min(levels, 2))
        raise ValueError(
            f"cluster {shown}: a path of this tree has 1 to {levels} parts; write the children taken from the root "
            f"down, such as {likely}"
        )
    number = 0
    for child in path:
        if not 0 <= child < children:
            raise ValueError(f"cluster {shown}: children are numbered 0 to {children - 1}; there is no {child}")
        number = number * children + child
    return len(path), number


def parse_path(text: str) -> ClusterPath:
    """A path written as `3` or `3.7`.

    Raises:
        ValueError: the text is not numbers joined by dots.
    """
    parts = text.strip().split(".")
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise ValueError(f"cluster {text!r}: write a path as numbers from the root down, such as 3 or 3.7")
    return tuple(int(part) for part in parts)


def format_path(path: Sequence[int]) -> str:
    """A path as text that `parse_path` reads."""
    return ".".join(str(part) for part in path)


def read_tree_record(folder: str | Path) -> dict[str, Any]:
    """Contents of a tree's tree.json, with the fingerprint verified.

    Raises:
        ValueError: it is missing, unfinished, damaged, or has another format; names the file and the remedy.
    """
    path = Path(folder) / TREE_FILE
    if not path.is_file():
        raise ValueError(f"{path}: missing, so {folder} holds no finished tree; write one with: kmem data cluster")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        version = record["version"] if record["format"] == TREE_FORMAT else None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: not the description of a cluster tree; run kmem data cluster again") from None
    if version != TREE_VERSION:
        raise ValueError(
            f"{path}: format version {version}, this kmem reads {TREE_VERSION}; run kmem data cluster again or use the "
            f"kmem that wrote it ({record.get('kmem_version', 'unknown')})"
        )
    if record.get("fingerprint") != record_fingerprint(record):
        raise ValueError(f"{path}: changed since it was written; copy the tree again or run kmem data cluster again")
    return dict(record)


def record_fingerprint(record: Mapping[str, Any]) -> str:
    """Digest of a tree.json. It covers the tree's other files, since tree.json holds their digests."""
    rest = {name: value for name, value in record.items() if name != "fingerprint"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
