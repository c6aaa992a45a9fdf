"""Leaves of held-out text where clusters are blocked: those that its own embeddings descend to."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from kmem.clustering import applying
from kmem.clustering.applying import apply_tree, leaves_around
from kmem.config import DataConfig, UserError
from kmem.data.indexed import IndexedTokens
from kmem.data.prepare import Preparation, prepare
from kmem.data.reader import SequenceReader
from kmem.data.tokenizer import load_tokenizer
from kmem.model.bank_router import ContextRouter, descend_elsewhere
from kmem.model.bank_tree import ClusterTree, read_tree_record
from tests.clustering.cluster_case import units_of
from tests.hf.banks import make_sentence_tree, make_tree
from tests.hf.models import tokenizer
from tests.small_corpora import make_texts, with_addresses, write_jsonl

BLOCKED = [(1,), (2, 0)]
TEXTS = make_texts(60, seed=2, longest=20)


@pytest.fixture(scope="module", params=["documents", "windows", "sentences"])
def addressed(request, tmp_path_factory):
    """(a prepared folder with the addresses of a tree, that tree)."""
    folder = tmp_path_factory.mktemp(request.param)
    options = {"tokenizer": tokenizer(), "validation_share": 0.5}
    prepare(Preparation([write_jsonl(folder / "texts.jsonl", TEXTS)], folder / "data", **options))
    if request.param == "sentences":
        tree = make_sentence_tree(folder / "tree", TEXTS)
    else:
        tree = make_tree(folder / "tree", unit="document" if request.param == "documents" else "window:8")
    apply_tree([folder / "data"], tree)
    return folder / "data", tree


def contexts(folder: Path, tree: Path) -> list[torch.Tensor]:
    """Token ids of the held-out units."""
    indexed, units = (
        IndexedTokens(folder / "validation"),
        units_of(folder, "validation", read_tree_record(tree)["unit"]),
    )
    return [
        torch.from_numpy(indexed.take(np.arange(start, start + length)))
        for start, length in zip(units.starts, units.lengths, strict=True)
    ]


def test_they_are_those_that_a_router_finds(addressed):
    folder, tree = addressed
    router, units = ContextRouter.load(tree, load_tokenizer(folder / "tokenizer")), contexts(folder, tree)
    stored, every = np.load(folder / "validation.addresses.npy"), np.arange(len(units))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert leaves_around(folder, "validation", every, tree, ()).tolist() == stored.tolist()
    around = leaves_around(folder, "validation", every, tree, BLOCKED)
    assert around.dtype == np.int32
    assert around.tolist() == router.leaves(units, BLOCKED).tolist()
    elsewhere = leaves_around(folder, "validation", every, tree, (), stored)
    assert elsewhere.tolist() == descend_elsewhere(router.tree, router.embed(units)).tolist()
    assert not (elsewhere // 3 == stored // 3).any()
    some = np.array([1, 4, 5, len(units) - 1])
    found = leaves_around(folder, "validation", some, tree, [(2, 1)], stored[some])
    assert (
        found.tolist()
        == descend_elsewhere(router.tree, router.embed([units[number] for number in some]), [(2, 1)]).tolist()
    )
    assert len(leaves_around(folder, "validation", every[:0], tree, BLOCKED)) == 0
    assert len(set(stored.tolist())) > 2
    assert len(set(around.tolist())) > 1
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}  # nothing is written


def test_several_chunks_are_one(addressed, monkeypatch):
    folder, tree = addressed
    every, jobs = np.arange(len(contexts(folder, tree))), []
    expected = leaves_around(folder, "validation", every[::2], tree, BLOCKED)
    real = applying.address
    monkeypatch.setattr(applying, "address", lambda job: (jobs.append(job), real(job))[1])
    for name, kind in applying.KINDS.items():
        monkeypatch.setitem(applying.KINDS, name, kind.__class__(**{**vars(kind), "chunk_tokens": 16 * 30}))
    assert leaves_around(folder, "validation", every[::2], tree, BLOCKED).tolist() == expected.tolist()
    assert len(jobs) > 2
    assert sum(len(job.chosen) for job in jobs) == len(expected)


@pytest.mark.parametrize("batching", ["packed", "leaf"])
def test_sequences_stay_and_their_addresses_change(addressed, batching):
    folder, tree = addressed
    config = DataConfig(sources=[{"path": str(folder)}], sequence_length=12)
    reader = SequenceReader(with_addresses(config, tree, batching), "validation")
    stored = np.load(folder / "validation.addresses.npy")
    assert reader.leaves.tolist() == stored.tolist()
    every = range(len(reader))
    assert reader.units(every).tolist() == list(range(len(stored)))
    moved = 100 + np.arange(len(stored))
    before, after = reader.read(every), reader.with_leaves(moved).read(every)
    for name in ("input_ids", "labels", "position_ids", "document_ids"):
        assert torch.equal(getattr(before, name), getattr(after, name))
    assert stored[after.addresses.numpy() - 100].tolist() == before.addresses.tolist()
    assert reader.units([3]).tolist() == sorted(set((after.addresses[3] - 100).tolist()))
    real = torch.ones_like(before.input_ids, dtype=torch.bool) if before.padding is None else ~before.padding
    for place, text in enumerate(contexts(folder, tree)):  # together, the positions of a unit read its text
        assert before.input_ids[(after.addresses == 100 + place) & real].tolist() == text.tolist()
    assert torch.equal(reader.read(every).addresses, before.addresses)


def test_several_sources_are_counted_one_after_the_other(addressed, tmp_path):
    folder, tree = addressed
    copy = shutil.copytree(folder, tmp_path / "copy")
    config = DataConfig(sources=[{"path": str(folder)}, {"path": str(copy)}], sequence_length=12)
    reader = SequenceReader(with_addresses(config, tree), "validation")
    count = len(reader.leaves) // 2
    assert reader.leaves[:count].tolist() == reader.leaves[count:].tolist()
    half = len(reader) // 2
    assert (reader.units([half, half + 1]) - count).tolist() == reader.units([0, 1]).tolist()


def test_a_damaged_tree_is_named(addressed, tmp_path):
    folder, tree = addressed
    broken = shutil.copytree(tree, tmp_path / "broken")
    (weights,) = (broken / "embedder").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"{weights}: .*\btree\b.*\bembedder\b"):
        leaves_around(folder, "validation", np.arange(2), broken, BLOCKED)
    weights.unlink()
    with pytest.raises(UserError, match=f"{weights}: missing"):
        leaves_around(folder, "validation", np.arange(2), broken, BLOCKED)
    assert ClusterTree.load(broken).children == 3
