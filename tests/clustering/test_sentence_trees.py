"""Trees over sentence embeddings, with a random encoder in the place of the published one: nothing is downloaded."""

import importlib
import shutil

import numpy as np
import torch

from kmem import cli
from kmem.data.tokenizer import load_tokenizer
from kmem.model.bank_router import ContextRouter
from kmem.model.bank_tree import ClusterTree
from tests.clustering.cluster_case import code, problems, prose
from tests.model.sentence_encoder import write_package

TEXTS = [*problems(8), *prose(8), *code(8)]


def test_addresses_are_those_that_inference_finds(make_corpus, tmp_path, monkeypatch):
    """For every document and every tokenizer, with the tree's own folder alone."""
    monkeypatch.syspath_prepend(str(write_package(tmp_path / "site")))
    importlib.invalidate_caches()
    data, other = (shutil.copytree(make_corpus(TEXTS, vocab_size=size), tmp_path / f"{size}") for size in (1000, 600))
    tree = tmp_path / "tree"
    options = ["--children", "3", "--levels", "2", "--embedder", "minilm", "--workers", "1"]
    assert cli.main(["data", "cluster", "--data", str(data), "--out", str(tree), *options]) == 0
    assert ClusterTree.load(tree).record["tokenizer"] is None
    assert "0.0" in (tree / "embedder" / "NOTICE").read_text()  # of the package that stands here, not of another
    assert cli.main(["data", "cluster", "--data", str(other), "--tree", str(tree), "--workers", "1"]) == 0
    for folder in (data, other):
        tokenizer = load_tokenizer(folder / "tokenizer")
        threads = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            router = ContextRouter.load(tree, tokenizer)
            leaves = router.leaves([tokenizer.encode(text) for text in TEXTS]).tolist()
        finally:
            torch.set_num_threads(threads)
        stored = [np.load(folder / f"{split}.addresses.npy").tolist() for split in ("train", "validation")]
        assert sorted(stored[0] + stored[1]) == sorted(leaves)
    assert len(set(leaves)) > 3
