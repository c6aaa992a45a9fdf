"""Split one node of a cluster tree: k-means over its embeddings, with a limit on the size of clusters."""

import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kmem.config import UserError
from kmem.model.bank_tree import nearest_children
from kmem.wording import counted

STEPS = 2
"""Steps of Lloyd's algorithm between two checks of the sizes. With many steps k-means returns to its old clusters; with
one step the halves of a split have not separated yet."""
LEAST_ROUNDS, MOST_ROUNDS = 10, 40
"""Checks of the sizes: after at least 20 steps (the paper's number), until the sizes are balanced."""

Vectors = NDArray[np.float32]


def split_node(vectors: Vectors, children: int, balance: float, needed: int, seed: int, name: str) -> Vectors:
    """Centroids of a node's children: float32 [children, D].

    k-means++ gives the first centroids, then Lloyd's algorithm moves them. Every few steps a cluster with more than
    `balance` times its even share is split at random with the smallest one: each gets the mean of a half
    (arXiv 2510.02375, section 3: clusters over 1.5/16 of the assignments). The largest cluster is split in the same way
    while any cluster has fewer vectors than needed. Among the balanced states the one with the smallest distances is
    taken. The result assigns vectors to the nearest centroid, so sizes are those of a descent of the tree.

    Args:
        vectors: [N, D], a node's embeddings or a sample of them.
        balance: 0 for plain k-means.
        needed: vectors that each child must have, so that it can be split in turn.
        seed: a 32-bit integer.
        name: name of the node in messages.

    Raises:
        UserError: the vectors do not fill the children.
    """
    from sklearn.cluster import KMeans, kmeans_plusplus
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    draw = np.random.RandomState(seed)
    limit = max(balance * len(vectors) / children, needed + 1) if balance else len(vectors)
    best: tuple[tuple[float, float], Any] = ((np.inf, np.inf), None)
    # One thread: with more, Lloyd's algorithm adds its sums in the order in which threads finish.
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        centroids, _ = kmeans_plusplus(vectors, children, random_state=draw)
        for number in range(1, MOST_ROUNDS + 1):
            fitted = KMeans(children, init=centroids, n_init=1, max_iter=STEPS, random_state=draw).fit(vectors)
            centroids, labels = fitted.cluster_centers_.astype(np.float32), fitted.labels_
            sizes = np.bincount(labels, minlength=children)
            excess = max(sizes.max() / limit, needed / max(sizes.min(), 0.5), 1.0)
            best = min(best, ((excess, float(fitted.inertia_)), centroids), key=lambda state: state[0])
            if number >= LEAST_ROUNDS and best[0][0] == 1:
                break
            if excess > 1:
                centroids = _rebalanced(vectors, centroids, labels, sizes, limit, needed, draw)
    return _filled(vectors, best[1], children, name)


def _rebalanced(
    vectors: Vectors,
    centroids: Vectors,
    labels: NDArray[np.int32],
    sizes: NDArray[np.int64],
    limit: float,
    needed: int,
    draw: np.random.RandomState,
) -> Vectors:
    """Split each cluster that is too large with a small one, the largest with the smallest."""
    centroids = centroids.copy()
    order = np.argsort(-sizes, kind="stable")
    count = max(int((sizes > limit).sum()), int((sizes < needed).sum()), 1)
    for large, small in zip(order[:count], order[::-1][:count], strict=True):
        if sizes[large] <= sizes[small] + 1:
            break
        members = draw.permutation(np.flatnonzero(labels == large))
        for cluster, half in ((large, members[::2]), (small, members[1::2])):
            centroids[cluster] = vectors[half].mean(axis=0)
    return centroids


def _filled(vectors: Vectors, centroids: Vectors, children: int, name: str) -> Vectors:
    """Move centroids until each is the nearest to some vector. A centroid that is not moves to the vector farthest from
    its centroid in the largest cluster that has distinct vectors."""
    rows = torch.from_numpy(vectors)
    root = torch.zeros(len(vectors), dtype=torch.int64)
    for _ in range(4 * children):
        nearest = nearest_children(rows, root, torch.from_numpy(centroids), children).numpy()
        sizes = np.bincount(nearest, minlength=children)
        if sizes.min() > 0:
            return centroids
        for largest in np.argsort(-sizes, kind="stable"):
            members = np.flatnonzero(nearest == largest)
            if len(members) and (vectors[members] != vectors[members[0]]).any():
                break
        else:
            break
        apart = np.square(vectors[members] - centroids[largest]).sum(axis=1)
        centroids = centroids.copy()
        centroids[sizes.argmin()] = vectors[members[apart.argmax()]]
    distinct = len(np.unique(vectors, axis=0))
    raise UserError(
        f"{name}: its {len(vectors):,} units have {counted(distinct, 'distinct embedding')}, too few to fill "
        f"{children} children; use fewer --children or --levels, or remove repeated documents"
    )
