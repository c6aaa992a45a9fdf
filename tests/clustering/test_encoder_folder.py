"""A tree over a sentence encoder from a local folder: its vectors are those of Transformers, and another kind of folder
is one error that names the file."""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from kmem import cli
from kmem.clustering import building
from kmem.clustering.encoder_folder import encoder_digest, read_encoder
from kmem.config import UserError
from kmem.data.tokenizer import load_tokenizer
from kmem.model.bank_embedder import load_embedder
from kmem.model.bank_router import ContextRouter
from kmem.model.bank_tree import ClusterTree
from tests.clustering.cluster_case import code, problems, prose
from tests.model.bert_folders import copied, expected, write_bert, write_json, write_sentence_bert, write_vocabulary

TEXTS = [*problems(8), *prose(8), *code(8)]
SHORT = ["The cat sleeps on a mat", "kernel DRIVER, device; table!", "memory 7"]


@pytest.fixture
def data(make_corpus, tmp_path) -> Path:
    return Path(shutil.copytree(make_corpus(TEXTS, vocab_size=1000), tmp_path / "data"))


def clustered(data: Path, encoder: Path, *options: str) -> Path:
    """The tree that the command makes."""
    tree = data.with_name("tree")
    made = ["--out", str(tree), "--children", "3", "--levels", "1", "--workers", "1", "--force"]
    chosen = ["--embedder", "encoder", "--encoder", str(encoder), *options]
    assert cli.main(["data", "cluster", "--data", str(data), *made, *chosen]) == 0
    return tree


def plain(folder: Path) -> tuple[Path, str, bool]:
    return write_bert(folder), "mean", True


def plain_with_a_pooling(folder: Path) -> tuple[Path, str, bool]:
    write_json(write_bert(folder) / "1_Pooling" / "config.json", {"pooling_mode": "cls"})
    return folder, "cls", True


def mean(folder: Path) -> tuple[Path, str, bool]:
    return write_sentence_bert(folder), "mean", True


def cls(folder: Path) -> tuple[Path, str, bool]:
    return write_sentence_bert(folder, "cls", newer=True), "cls", True


def of_any_length(folder: Path) -> tuple[Path, str, bool]:
    return write_sentence_bert(folder, "cls", normalize=False), "cls", False


def cased_vocabulary(folder: Path) -> tuple[Path, str, bool]:
    write_vocabulary(write_bert(folder), lower_case=False)
    return folder, "mean", True


def uncased_vocabulary(folder: Path) -> tuple[Path, str, bool]:
    write_vocabulary(write_sentence_bert(folder, "cls"), lower_case=True)
    return folder, "cls", True


@pytest.mark.parametrize(
    "layout", [plain, plain_with_a_pooling, mean, cls, of_any_length, cased_vocabulary, uncased_vocabulary]
)
def test_vectors_are_those_of_transformers_and_leaves_those_of_the_tree(layout, data, tmp_path):
    encoder, pooling, normalize = layout(tmp_path / "small-bert")
    tree = clustered(data, encoder)
    tokenizer = load_tokenizer(data / "tokenizer")
    embedder = load_embedder(tree / "embedder", tokenizer)
    shutil.move(encoder, tmp_path / "away")  # the tree has all it needs
    for text in SHORT:
        (vector,) = embedder.embed([torch.tensor(tokenizer.encode(text))])
        torch.testing.assert_close(vector, expected(tmp_path / "away", text, pooling, normalize), atol=1e-5, rtol=0)
    leaves = ContextRouter.load(tree, tokenizer).leaves([tokenizer.encode(text) for text in TEXTS]).tolist()
    stored = [np.load(data / f"{split}.addresses.npy").tolist() for split in ("train", "validation")]
    assert sorted(stored[0] + stored[1]) == sorted(leaves)
    assert len(set(leaves)) == 3
    record = ClusterTree.load(tree).record
    assert record["tokenizer"] is None
    assert (record["embedder"]["name"], record["embedder"]["encoder"]) == ("encoder", "small-bert")


def test_a_long_text_is_the_mean_of_its_pieces(data, tmp_path):
    """With cls, of the pieces' first marks; of more than --pieces, those evenly spread."""
    tree = clustered(
        data, write_sentence_bert(tmp_path / "bert", "cls", normalize=False, max_seq_length=6), "--pieces", "2"
    )
    assert json.loads((tree / "embedder" / "embedder.json").read_text())["max_word_pieces"] == 6

    class Words:
        def decode(self, ids, skip_special_tokens):
            return " ".join(("cat", "mat", "kernel")[number] for number in ids)

    embedder = load_embedder(tree / "embedder", Words())
    first, second, third = (torch.full((4,), number) for number in range(3))
    one, two = embedder.embed([first, second])
    torch.testing.assert_close(embedder.embed([torch.cat([first, second])])[0], (one + two) / 2, atol=1e-5, rtol=0)
    spread = embedder.embed([torch.cat([first, third, second, third])])[0]
    torch.testing.assert_close(spread, (one + two) / 2, atol=1e-5, rtol=0)


def test_texts_are_lower_cased_where_the_folder_says_so(data, tmp_path):
    encoder = write_sentence_bert(tmp_path / "bert")
    write_vocabulary(encoder, lower_case=False)
    tokenizer = load_tokenizer(data / "tokenizer")
    upper, lower = (torch.tensor(tokenizer.encode(text)) for text in ("THE CAT", "the cat"))
    alike = []
    for first in (False, True):
        write_json(encoder / "sentence_bert_config.json", {"max_seq_length": 24, "do_lower_case": first})
        vectors = load_embedder(clustered(data, encoder) / "embedder", tokenizer).embed([upper, lower])
        alike.append(torch.equal(*vectors))
    assert alike == [False, True]


def test_the_least_of_the_limits_holds(tmp_path):
    encoder = write_sentence_bert(tmp_path / "bert", max_seq_length=100)
    assert read_encoder(encoder).settings["max_word_pieces"] == 100
    write_json(encoder / "tokenizer_config.json", {"model_max_length": 64})
    assert read_encoder(encoder).settings["max_word_pieces"] == 64
    (encoder / "sentence_bert_config.json").unlink()
    (encoder / "tokenizer_config.json").unlink()
    assert read_encoder(encoder).settings["max_word_pieces"] == 512  # of config.json


def test_a_fingerprint_is_that_of_weights_tokenizer_and_pooling(data, tmp_path):
    def fingerprint(folder: Path) -> str:
        return ClusterTree.load(clustered(data, folder)).record["embedder"]["fingerprint"]

    encoder = write_sentence_bert(tmp_path / "0" / "bert")
    first, digest = fingerprint(encoder), encoder_digest(encoder)
    assert fingerprint(copied(encoder, tmp_path / "1" / "bert")) == first
    other = [copied(encoder, tmp_path / f"{number}" / "bert") for number in range(2, 5)]
    weights = load_file(other[0] / "model.safetensors")
    weights["embeddings.word_embeddings.weight"] += 1
    save_file(weights, other[0] / "model.safetensors", metadata={"format": "pt"})
    write_json(other[1] / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer", "do_lower_case": False})
    write_json(other[2] / "1_Pooling" / "config.json", {"pooling_mode": "cls"})
    assert len({first, *map(fingerprint, other)}) == 4
    assert len({digest, *map(encoder_digest, other)}) == 4


def test_interrupted_work_goes_on_with_the_same_encoder_alone(data, tmp_path, capsys, monkeypatch):
    encoder = write_sentence_bert(tmp_path / "bert")

    def interrupted(*arguments):
        raise KeyboardInterrupt

    command = ["data", "cluster", "--data", str(data), "--out", str(tmp_path / "tree"), "--children", "3", "--levels"]
    command += ["1", "--workers", "1", "--embedder", "encoder", "--encoder", str(encoder)]
    with monkeypatch.context() as patched:
        patched.setattr(building, "split_children", interrupted)
        assert cli.main(command) == 130
    write_json(encoder / "1_Pooling" / "config.json", {"pooling_mode": "cls"})
    capsys.readouterr()
    assert cli.main(command) == 2
    assert re.search(r": .*\banother encoder\b.*--force", capsys.readouterr().err)
    write_json(encoder / "1_Pooling" / "config.json", {"pooling_mode": "mean"})  # what it was, in other words
    assert cli.main(command) == 0


def test_the_licence_goes_with_the_tree_and_its_lack_is_said(data, tmp_path, capsys):
    encoder = write_bert(tmp_path / "bert")
    tree = clustered(data, encoder)
    assert re.search(f"--encoder {encoder}: .*LICENSE", capsys.readouterr().err)
    assert json.loads((tree / "embedder" / "embedder.json").read_text())["licences"] == []
    for name in ("LICENSE.txt", "NOTICE", "README.md"):
        (encoder / name).write_text(f"{name}: random numbers.\n")
    tree = clustered(data, encoder)
    assert "LICENSE" not in capsys.readouterr().err
    assert json.loads((tree / "embedder" / "embedder.json").read_text())["licences"] == ["LICENSE.txt", "NOTICE"]
    for name in ("LICENSE.txt", "NOTICE", "README.md"):
        assert (tree / "embedder" / name).read_bytes() == (encoder / name).read_bytes()


def without(name: str):
    return lambda folder: (folder / name).unlink()


def changed(name: str, **fields):
    return lambda folder: write_json(folder / name, {**json.loads((folder / name).read_text()), **fields})


def written(name: str, content):
    return lambda folder: write_json(folder / name, content)


def damaged(name: str):
    return lambda folder: (folder / name).write_text("{")


def without_a_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def with_numbers_that_are_none(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["embeddings.word_embeddings.weight"] *= torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def without_marks(folder: Path) -> None:
    changed("tokenizer.json", post_processor=None)(folder)
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


MODULE = "sentence_transformers.models."


@pytest.mark.parametrize(
    ("damage", "named", "message"),
    [
        (shutil.rmtree, "", "no such"),
        (without("config.json"), "config.json", "missing"),
        (damaged("config.json"), "config.json", "JSON"),
        (changed("config.json", model_type="roberta"), "config.json", 'model_type .*"roberta"'),
        (changed("config.json", auto_map={"AutoModel": "own.Model"}), "config.json", "auto_map"),
        (changed("config.json", position_embedding_type="relative_key"), "config.json", "position_embedding_type"),
        (changed("config.json", hidden_size=36), "", "--encoder .*loaded"),
        (changed("config.json", vocab_size=9), "", "--encoder .*loaded"),
        (without("model.safetensors"), "model.safetensors", "missing"),
        (pickled, "pytorch_model.bin", "python -c"),
        (damaged("model.safetensors"), "", "--encoder .*loaded"),
        (without_a_tensor, "model.safetensors", r"\b1 tensor"),
        (with_numbers_that_are_none, "", r"numbers.*model\.safetensors"),
        (without("tokenizer.json"), "tokenizer.json", r"missing.*vocab\.txt"),
        (damaged("tokenizer.json"), "", r"tokenizer\.json.*line 1 column"),
        (without_marks, "tokenizer.json", r"\b0 .*\[CLS\].*\[SEP\]"),
        (without("1_Pooling/config.json"), "1_Pooling/config.json", "missing"),
        (written("1_Pooling/config.json", {"pooling_mode": "max"}), "1_Pooling/config.json", '"max"'),
        (written("1_Pooling/config.json", {"pooling_mode": ["cls", "mean"]}), "1_Pooling/config.json", '"cls", "mean"'),
        (changed("1_Pooling/config.json", pooling_mode_max_tokens=True), "1_Pooling/config.json", "pooling_mode_max"),
        (written("modules.json", {}), "modules.json", "JSON array"),
        (written("modules.json", [{}]), "modules.json", "list of modules"),
        (
            written("modules.json", [{"type": MODULE + name, "path": ""} for name in ("Transformer", "Dense")]),
            "modules.json",
            "Transformer, Dense",
        ),
        (changed("sentence_bert_config.json", max_seq_length=2), "sentence_bert_config.json", r"\b2 word pieces"),
        (
            changed("config_sentence_transformers.json", default_prompt_name="query"),
            "config_sentence_transformers.json",
            'default_prompt_name .*"query"',
        ),
    ],
)
def test_a_folder_that_is_no_such_encoder_is_one_error(damage, named, message, data, tmp_path, capsys):
    encoder = write_sentence_bert(tmp_path / "bert")
    damage(encoder)
    capsys.readouterr()
    with pytest.raises(AssertionError):
        clustered(data, encoder)
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    assert str(encoder / named) in said
    assert re.search(message, said), said
    assert not list(tmp_path.glob("tree*"))
    assert not (data / "addresses.json").exists()


def test_a_pickle_is_converted_by_the_command_that_its_error_names(data, tmp_path):
    encoder = write_sentence_bert(tmp_path / "bert")
    before = load_file(encoder / "model.safetensors")
    pickled(encoder)
    with pytest.raises(UserError, match=r"pytorch_model\.bin: .*python -c") as error:
        read_encoder(encoder)
    *_, program = shlex.split(str(error.value)[str(error.value).index("python -c") :])
    exec(program, {})
    after = load_file(encoder / "model.safetensors")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    clustered(data, encoder)


def test_the_command_asks_for_the_folder(data, tmp_path, capsys):
    command = ["data", "cluster", "--data", str(data), "--out", str(tmp_path / "tree")]
    for wrong, message in (
        (["--embedder", "encoder"], "--embedder encoder: .*--encoder DIR"),
        (["--encoder", str(tmp_path)], "--encoder: .*--embedder encoder.*minilm"),
        (["--embedder", "tfidf", "--pieces", "2"], "--pieces: .*--embedder minilm, encoder.*tfidf"),
    ):
        assert cli.main([*command, *wrong]) == 2
        assert re.search(message, capsys.readouterr().err)
