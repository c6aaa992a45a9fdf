import json

import pytest
import torch
from safetensors.torch import save_file

from kmem.model.bank_tree import (
    CENTROIDS_FILE,
    TREE_FILE,
    ClusterTree,
    cluster_of,
    format_path,
    level_ids,
    parse_path,
    path_of,
    record_fingerprint,
)
from kmem.model.file_digest import file_digest

K, LEVELS, DIM = 3, 3, 5


def make_tree(seed: int = 0, dim: int = DIM) -> ClusterTree:
    draw = torch.Generator().manual_seed(seed)
    centroids = tuple(torch.randn(K**level, dim, generator=draw) for level in range(1, LEVELS + 1))
    return ClusterTree(centroids, {"children": K, "levels": LEVELS, "fingerprint": "tree"})


def contexts(count: int, dim: int = DIM) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(9))


def naive_leaf(tree: ClusterTree, vector: torch.Tensor, blocked: set[tuple[int, ...]] = frozenset()) -> int:
    """The specification, one child at a time; a path is open if it is not below a blocked one and leads to a leaf."""

    def open_leaves(path: tuple[int, ...]) -> bool:
        if any(path[: len(stop)] == stop for stop in blocked):
            return False
        return len(path) == LEVELS or any(open_leaves((*path, child)) for child in range(K))

    path: tuple[int, ...] = ()
    node = 0
    for level in range(LEVELS):
        distances = {}
        for child in range(K):
            if open_leaves((*path, child)):
                centroid = tree.centroids[level][node * K + child]
                distances[child] = sum((float(a) - float(b)) ** 2 for a, b in zip(vector, centroid, strict=True))
        child = min(distances, key=lambda number: (distances[number], number))
        path, node = (*path, child), node * K + child
    return node


def test_descent_equals_the_naive_one():
    tree, vectors = make_tree(), contexts(200)
    leaves = tree.descend(vectors)
    assert leaves.dtype == torch.int64
    assert leaves.tolist() == [naive_leaf(tree, vector) for vector in vectors]
    assert len(set(leaves.tolist())) > K**LEVELS // 2
    assert tree.descend(vectors[:0]).tolist() == []


@pytest.mark.parametrize("blocked", [{(1,)}, {(0, 2), (2,)}, {(1, 0), (1, 1), (1, 2)}, {(0,), (1,), (2, 0), (2, 1, 1)}])
def test_blocked_clusters_give_way_to_the_next_nearest(blocked):
    tree, vectors = make_tree(), contexts(200)
    leaves, first = tree.descend(vectors, blocked), tree.descend(vectors)
    assert leaves.tolist() == [naive_leaf(tree, vector, blocked) for vector in vectors]
    entered = {path_of(leaf, LEVELS, K)[: len(path)] for leaf in leaves.tolist() for path in blocked}
    assert not entered & blocked
    closed = tree.blocked_leaves(blocked)
    expected = [any(path_of(leaf, LEVELS, K)[: len(path)] == path for path in blocked) for leaf in range(tree.leaves)]
    assert closed.tolist() == expected
    assert torch.equal(leaves[~closed[first]], first[~closed[first]])  # contexts that were elsewhere stay there


def test_everything_blocked_is_an_error():
    with pytest.raises(ValueError, match=r"every cluster\b.*blocked"):
        make_tree().descend(contexts(1), [(0,), (1,), (2, 0), (2, 1), (2, 2)])


def test_equally_near_children_give_the_lowest():
    tree = make_tree()
    same = tuple(rows[:1].expand_as(rows).contiguous() for rows in tree.centroids)
    assert set(ClusterTree(same, tree.record).descend(contexts(50)).tolist()) == {0}


def test_a_leaf_depends_on_its_context_alone():
    # Centroids so near each other that a sum in another order would decide otherwise.
    draw = torch.Generator().manual_seed(3)
    base = torch.randn(1, 257, generator=draw)
    centroids = tuple(base + 1e-7 * torch.randn(K**level, 257, generator=draw) for level in range(1, LEVELS + 1))
    tree, vectors = ClusterTree(centroids, make_tree().record), contexts(5000, 257)
    together = tree.descend(vectors)
    for size in (1, 7, 64):
        some = vectors[: 20 * size]
        assert torch.equal(torch.cat([tree.descend(part) for part in some.split(size)]), together[: len(some)])
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(tree.descend(vectors), together)
    finally:
        torch.set_num_threads(threads)


def test_ids_of_a_level_and_paths():
    tree = make_tree()
    for leaf in range(K**LEVELS):
        path = path_of(leaf, LEVELS, K)
        for level in range(1, LEVELS + 1):
            assert cluster_of(path[:level], K, LEVELS) == (level, int(tree.level_ids(torch.tensor(leaf), level)))
    assert level_ids(torch.tensor([65_535]), 1, 16, 4).tolist() == [15]
    assert parse_path("2.0.1") == (2, 0, 1)
    assert format_path((2, 0, 1)) == "2.0.1"
    for wrong in ("", "1.", "a", "-1", "1,2"):
        with pytest.raises(ValueError, match=f"^cluster '{wrong}': "):
            parse_path(wrong)
    for wrong_path in ((), (0, 0, 0, 0), (3,)):
        with pytest.raises(ValueError, match=f"^cluster {format_path(wrong_path)}: "):
            cluster_of(wrong_path, K, LEVELS)


def test_another_dimension_is_an_error():
    with pytest.raises(ValueError, match=r"\[2, 6\].*\[N, 5\].*embedder"):
        make_tree().descend(torch.zeros(2, DIM + 1))


def write(folder, tree: ClusterTree) -> None:
    save_file({f"level{n}": rows for n, rows in enumerate(tree.centroids, 1)}, str(folder / CENTROIDS_FILE))
    record = {
        "format": "kmem-cluster-tree",
        "version": 1,
        "children": K,
        "levels": LEVELS,
        "embedder": {"name": "tfidf", "dim": DIM},
        "files": {CENTROIDS_FILE: file_digest(folder / CENTROIDS_FILE)},
    }
    record["fingerprint"] = record_fingerprint(record)
    (folder / TREE_FILE).write_text(json.dumps(record))


def test_a_stored_tree_is_the_same_and_damage_is_noticed(tmp_path):
    tree = make_tree()
    write(tmp_path, tree)
    loaded = ClusterTree.load(tmp_path)
    assert torch.equal(loaded.descend(contexts(50)), tree.descend(contexts(50)))
    assert (loaded.children, loaded.levels, loaded.leaves, loaded.dim) == (K, LEVELS, K**LEVELS, DIM)

    text = (tmp_path / TREE_FILE).read_text()
    for wrong, message in (
        (text.replace('"levels": 3', '"levels": 2'), r"tree\.json: changed"),
        (text.replace('"version": 1', '"version": 9'), r"tree\.json: .*version 9\b"),
        ("[]", r"tree\.json: .*\bdescription\b"),
    ):
        (tmp_path / TREE_FILE).write_text(wrong)
        with pytest.raises(ValueError, match=message):
            ClusterTree.load(tmp_path)
    (tmp_path / TREE_FILE).write_text(text)
    with open(tmp_path / CENTROIDS_FILE, "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    with pytest.raises(ValueError, match=r"tree\.safetensors: .*tree\.json"):
        ClusterTree.load(tmp_path)
    (tmp_path / TREE_FILE).unlink()
    with pytest.raises(ValueError, match=r"tree\.json: missing.*kmem data cluster"):
        ClusterTree.load(tmp_path)
