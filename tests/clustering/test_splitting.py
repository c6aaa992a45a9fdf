import numpy as np
import pytest
import torch

from kmem.clustering.splitting import split_node
from kmem.clustering.tree_folder import gini, level_sizes
from kmem.config import UserError
from kmem.model.bank_tree import nearest_children

K = 4


def lopsided(count: int = 2000) -> np.ndarray:
    """Four heaps, one of which has nine tenths of the points."""
    draw = np.random.default_rng(0)
    heap = draw.choice(K, size=count, p=[0.9, 0.04, 0.03, 0.03])
    return (10 * np.eye(K, 8)[heap] + draw.normal(size=(count, 8))).astype(np.float32)


def sizes_of(vectors: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    root = torch.zeros(len(vectors), dtype=torch.int64)
    found = nearest_children(torch.from_numpy(vectors), root, torch.from_numpy(centroids), len(centroids))
    return np.bincount(found.numpy(), minlength=len(centroids))


def test_plain_k_means_finds_the_heaps():
    sizes = sizes_of(lopsided(), split_node(lopsided(), K, 0, 1, 3, "root"))
    assert sorted(sizes / 2000) == pytest.approx([0.03, 0.03, 0.04, 0.9], abs=0.015)


@pytest.mark.parametrize("seed", range(3))
def test_balancing_splits_what_is_too_large(seed):
    vectors = lopsided()
    assert sizes_of(vectors, split_node(vectors, K, 1.5, 1, seed, "root")).max() <= 1.5 * len(vectors) / K
    # It is the rule that keeps them small, not the data.
    assert sizes_of(vectors, split_node(vectors, K, 0, 1, seed, "root")).max() > 1.7 * len(vectors) / K


def test_children_get_the_units_that_their_own_children_need():
    vectors = lopsided()
    assert sizes_of(vectors, split_node(vectors, K, 0, 1, 1, "root")).min() < 180
    assert sizes_of(vectors, split_node(vectors, K, 1.5, 180, 1, "root")).min() >= 180


def test_the_same_seed_gives_the_same_bits():
    first, again, other = (split_node(lopsided(), K, 1.5, 1, seed, "root") for seed in (5, 5, 6))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert first.dtype == np.float32
    assert first.shape == (K, 8)


def test_every_child_has_a_unit_even_of_few():
    vectors = np.eye(K, 8, dtype=np.float32)
    assert sizes_of(vectors, split_node(vectors, K, 1.5, 1, 0, "root")).tolist() == [1] * K


def test_too_few_distinct_embeddings_are_an_error():
    vectors = np.repeat(np.eye(3, 8, dtype=np.float32), 50, axis=0)
    with pytest.raises(UserError, match=r"^cluster 2\.1: .*\b150 units .*\b3 distinct .*\b4 children"):
        split_node(vectors, K, 1.5, 1, 0, "cluster 2.1")


def test_sizes_of_a_level():
    leaf_sizes = np.array([1, 2, 3, 4, 10, 0])
    assert level_sizes(leaf_sizes, 2) == {"clusters": 3, "smallest": 3, "median": 7.0, "largest": 10, "gini": 0.2333}
    assert gini(np.array([5, 5, 5])) == 0
    assert gini(np.array([0, 0, 0, 12])) == pytest.approx(0.75)


@pytest.mark.parametrize("seed", range(12))
def test_many_duplicates_fill_the_children_that_they_can(seed):
    """The largest cluster may be one document many times over; those with different documents are divided."""
    draw = np.random.default_rng(seed)
    distinct = draw.normal(size=(20, 4)).astype(np.float32)
    vectors = np.concatenate([np.repeat(distinct[:1], 500, axis=0), distinct[draw.integers(20, size=140)], distinct])
    assert sizes_of(vectors, split_node(vectors, 16, 1.5, 1, seed, "root")).min() > 0
    with pytest.raises(UserError, match=r"^root: .*\b660 units .*\b20 distinct .*\b21 children"):
        split_node(vectors, 21, 1.5, 1, seed, "root")
