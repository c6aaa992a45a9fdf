"""Exports of models whose contexts are found by an embedder of the user's own: torch and Transformers suffice, and the
leaves are those of the training data."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from kmem import cli
from kmem.clustering.embedders import KINDS, EmbedderKind, EmbedderOption, register_embedder
from kmem.config import UserError
from kmem.data.prepare import Preparation, prepare
from kmem.data.tokenizer import load_tokenizer
from kmem.hf.export import export
from kmem.model.bank_embedder import EMBEDDERS
from kmem.model.bank_router import ContextRouter
from tests.hf import letters as letters_module
from tests.hf.banks import BANKS, CHILDREN, LEVELS, write_bank_run
from tests.hf.letters import Letters
from tests.hf.models import tokenizer
from tests.model.bert_folders import write_sentence_bert
from tests.small_corpora import make_texts, write_jsonl

TEXTS = make_texts(40, seed=3, longest=20)
PROGRAM = """
import sys
for name in ("kmem", "kmem_kernels"):
    sys.modules[name] = None
from transformers import AutoModelForCausalLM
folder, texts, *copy = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, tables="device" if copy else "mmap")
if copy:
    model.save_pretrained(copy[0])
print(model.fetch(open(texts).read().split("\\0")).leaves.tolist())
"""


class Inside:
    """A class in a file that needs kmem."""

    load, embed = Letters.load, Letters.embed


@pytest.fixture
def data(tmp_path) -> Path:
    source = write_jsonl(tmp_path / "texts.jsonl", TEXTS)
    prepare(Preparation([source], tmp_path / "data", tokenizer=tokenizer(), validation_share=0.5))
    return tmp_path / "data"


@pytest.fixture
def letters():
    def build(request, folder):
        return {"dim": request.options.get("remainders", 24)}

    options = (EmbedderOption("remainders", "N", "remainders that are counted", least=2),)
    kind = EmbedderKind("counts of remainders", build, 4000, reads_text=False, options=options)
    register_embedder("letters", kind, Letters)
    yield kind
    del KINDS["letters"], EMBEDDERS["letters"]


def clustered(data: Path, *options: str) -> Path:
    tree = data.with_name("tree")
    made = ["--children", str(CHILDREN), "--levels", str(LEVELS), "--workers", "1", "--out", str(tree)]
    assert cli.main(["data", "cluster", "--data", str(data), *made, *options]) == 0
    return tree


def exported(tree: Path, said: list[str]) -> Path:
    run, out = tree.with_name("run"), tree.with_name("out")
    export(write_bank_run(run, BANKS["ffn"], own=tree), out, say=said.append)
    return out


@pytest.fixture
def leaves_without_kmem(run_without_kmem, tmp_path):
    """leaves(folder, *options): of all texts, by the code of an exported folder alone."""
    (tmp_path / "texts").write_text("\0".join(TEXTS))

    def leaves(folder: Path, *options: str) -> list[int]:
        done = run_without_kmem(PROGRAM, folder, tmp_path / "texts", *options)
        return json.loads(done.stdout.splitlines()[-1])

    return leaves


def stored(data: Path) -> list[int]:
    return sorted(
        np.concatenate([np.load(data / f"{split}.addresses.npy") for split in ("train", "validation")]).tolist()
    )


@pytest.mark.parametrize("pooling", ["mean", pytest.param("cls", marks=pytest.mark.full)])
def test_an_encoder_of_ones_own_goes_with_the_export(pooling, data, tmp_path, leaves_without_kmem):
    encoder = write_sentence_bert(tmp_path / "bert", pooling)
    if pooling == "cls":
        (encoder / "LICENSE").write_text("None: random numbers.\n")
    said: list[str] = []
    out = exported(clustered(data, "--embedder", "encoder", "--encoder", str(encoder)), said)
    leaves = leaves_without_kmem(out)
    assert sorted(leaves) == stored(data)
    assert len(set(leaves)) > CHILDREN
    lacks = [line for line in said if re.search(r"tree/embedder: .*\bbert\b.*LICENSE", line)]
    if pooling == "cls":
        assert not lacks
        assert (out / "tree" / "embedder" / "LICENSE").read_text() == "None: random numbers.\n"
    else:
        assert len(lacks) == 1


def test_a_registered_class_goes_with_the_export(data, letters, tmp_path, leaves_without_kmem):
    out = exported(clustered(data, "--embedder", "letters", "--remainders", "30"), [])
    leaves = leaves_without_kmem(out, str(tmp_path / "saved"))
    assert leaves == ContextRouter.load(out / "tree", load_tokenizer(tokenizer())).leaves(TEXTS).tolist()
    assert len(set(leaves)) > CHILDREN
    source = Path(letters_module.__file__).read_bytes()
    for folder in (out, tmp_path / "saved"):
        assert (folder / "registered_embedder.py").read_bytes() == source


def test_a_class_that_needs_more_than_exports_have_is_refused(data, letters, tmp_path):
    EMBEDDERS["letters"] = Inside
    tree = clustered(data, "--embedder", "letters")
    with pytest.raises(UserError, match=r"test_plugged_embedders\.py: imports kmem\b.*\bInside\b.*\bletters\b"):
        exported(tree, [])
    assert not tmp_path.joinpath("out").exists()


def test_a_process_that_does_not_register_it_says_so(data, letters, capsys):
    tree = clustered(data, "--embedder", "letters")
    found = EMBEDDERS.pop("letters"), KINDS.pop("letters")
    capsys.readouterr()
    try:
        assert cli.main(["data", "cluster", "--data", str(data), "--tree", str(tree)]) == 2
    finally:
        EMBEDDERS["letters"], KINDS["letters"] = found
    said = capsys.readouterr().err
    assert f"{tree}/embedder/embedder.json: " in said
    assert "register_embedder" in said


def test_a_name_stands_for_one_embedder(letters):
    register_embedder("letters", letters, Letters)  # the same again
    with pytest.raises(ValueError, match=r"^letters: [^-]*\bembedder\b"):
        register_embedder("letters", letters, Inside)
    with pytest.raises(ValueError, match=r"^tfidf: [^-]*\bembedder\b"):
        register_embedder("tfidf", letters, Letters)
    path = EmbedderKind("", lambda *_: {}, 1, False, (EmbedderOption("pieces", "DIR", "", parse=Path),))
    with pytest.raises(ValueError, match=r"^other: --pieces\b"):
        register_embedder("other", path, Letters)
    assert "other" not in KINDS


def test_the_files_of_a_tree_and_an_export_have_the_mode_of_the_umask(data, tmp_path):
    before = os.umask(0o027)
    try:
        tree = clustered(data, "--embedder", "tfidf", "--dim", "4")
        out = exported(tree, [])
    finally:
        os.umask(before)
    for folder in (tree, out):
        files = {path: path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()}
        assert {path.name for path in files} >= {"tree.json", "tree.safetensors", "tfidf.safetensors"}
        assert set(files.values()) == {0o640}, files
