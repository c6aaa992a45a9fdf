"""`kmem data adopt` on data that Megatron-core's own builder wrote."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from kmem.cli import main
from kmem.config import DataConfig, UserError
from kmem.data import adopt as adoption
from kmem.data.adopt import Adoption, adopt
from kmem.data.bank_addresses import data_fingerprint
from kmem.data.held_out import source_of_documents
from kmem.data.indexed import IndexedTokens
from kmem.data.manifest import Manifest, read_manifest
from kmem.data.reader import open_data
from kmem.data.tokenizer import Encoder
from tests.small_corpora import make_texts
from tests.warm_processes import start_command

EOS = 0
FIRST, SECOND = make_texts(60, seed=1), make_texts(40, seed=2, longest=90)


@pytest.fixture(scope="module")
def prepared(make_corpus) -> Path:
    return make_corpus(FIRST, vocab_size=300)


@pytest.fixture
def tokenizer(prepared) -> Path:
    return prepared / "tokenizer"


def encoded(tokenizer: Path, texts: list[str]) -> list[list[int]]:
    return Encoder(tokenizer, EOS).encode(texts)


def build(prefix: Path, documents: list[list[int]], dtype: type = np.uint16, cut: int = 10**9, **options) -> Path:
    """Write documents as Megatron-LM's preprocess_data.py does. cut: most tokens of a sequence."""
    from tests.data.megatron import IndexedDatasetBuilder

    prefix.parent.mkdir(parents=True, exist_ok=True)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype, **options)
    for ids in documents:
        lengths = [len(ids[start : start + cut]) for start in range(0, len(ids), cut)] or [0]
        builder.add_document(np.array(ids), lengths, **({"modes": [0] * len(lengths)} if options else {}))
    builder.finalize(f"{prefix}.idx")
    return prefix


def adopted(out: Path, tokenizer: Path, *prefixes: Path, **options) -> Manifest:
    return adopt(Adoption(prefixes=prefixes, tokenizer=tokenizer, out=out, **options))


def documents_of(folder: Path, split: str) -> list[list[int]]:
    indexed = IndexedTokens.of_split(folder, read_manifest(folder), split)
    return [
        indexed.take(np.arange(start, start + length)).tolist()
        for start, length in zip(indexed.starts, indexed.lengths, strict=True)
    ]


def content(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.iterdir()}


def config_of(folder: Path) -> DataConfig:
    return DataConfig(sources=[{"path": str(folder)}], sequence_length=32, seed=5)


def test_prepared_data_that_is_adopted_reads_the_same(prepared, tokenizer, tmp_path):
    manifest = adopted(tmp_path / "out", tokenizer, prepared / "train", validation=[prepared / "validation"])
    there = read_manifest(prepared)
    for split, record in there.splits.items():
        assert manifest.splits[split] == record.model_copy(update={"parts": (split,)})
    assert manifest.files == there.files
    assert data_fingerprint(manifest) == data_fingerprint(there)
    before, after = (open_data(config_of(folder), None) for folder in (prepared, tmp_path / "out"))
    assert before.fingerprint == after.fingerprint
    assert before.bytes_per_token_validation == after.bytes_per_token_validation
    assert (before.training.read(range(9)).input_ids == after.training.read(range(9)).input_ids).all()


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_a_share_of_the_documents_of_several_datasets_is_held_out(tokenizer, tmp_path, monkeypatch, dtype):
    """With documents of several sequences, documents without tokens, and chunks that end inside of documents."""
    monkeypatch.setattr(adoption, "_CHUNK_TOKENS", 97)
    data, out = tmp_path / "data", tmp_path / "elsewhere" / "out"
    first, second = encoded(tokenizer, FIRST), encoded(tokenizer, SECOND)
    build(data / "one_text_document", [[], *first[:30], [], *first[30:]], dtype, cut=7)
    build(data / "two_text_document", [*second, []], dtype)
    before = content(data)
    manifest = adopted(
        out, tokenizer, data / "one_text_document", data / "two_text_document.bin", validation_share=0.1, seed=3
    )
    assert content(data) == before
    held_out, trained_on = documents_of(out, "validation"), documents_of(out, "train")
    assert len(held_out) == 10
    documents, texts = [*first, *second], [*FIRST, *SECOND]
    assert [ids for ids in documents if ids not in held_out] == trained_on  # in the order of the input
    for split, found in (("train", trained_on), ("validation", held_out)):
        record = manifest.splits[split]
        assert (record.documents, record.tokens, record.unknown) == (len(found), sum(map(len, found)), 0)
        assert record.bytes == sum(len(texts[documents.index(ids)].encode()) for ids in found)
    sources = source_of_documents(manifest)
    assert sources["train"].tolist() == [documents.index(ids) >= len(first) for ids in trained_on]
    assert read_manifest(out) == manifest
    stream = np.concatenate([np.array(ids) for ids in documents])
    places = np.random.default_rng(0).permutation(len(stream))
    joined = IndexedTokens(data / "one_text_document", data / "two_text_document")
    assert (joined.take(places) == stream[places]).all()


def test_a_moved_dataset_is_the_same_data(tokenizer, tmp_path):
    fingerprints = []
    for place in ("here", "there"):
        build(tmp_path / place / "text", encoded(tokenizer, FIRST))
        manifest = adopted(tmp_path / f"out-{place}", tokenizer, tmp_path / place / "text")
        fingerprints.append((open_data(config_of(tmp_path / f"out-{place}"), None).fingerprint, manifest.files))
    assert fingerprints[0] == fingerprints[1]


def test_what_adopted_files_become_is_noticed(tokenizer, tmp_path):
    prefix, out = build(tmp_path / "data" / "text", encoded(tokenizer, FIRST)), tmp_path / "out"
    adopted(out, tokenizer, prefix)
    file = Path(f"{prefix}.bin")
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(UserError, match=rf"documents\.bin: damaged: .*{file}"):
        read_manifest(out)
    file.unlink()
    with pytest.raises(UserError, match=rf"documents\.bin: missing.*{file}"):
        read_manifest(out)


def test_only_a_user_who_says_so_replaces_a_folder(tokenizer, tmp_path):
    prefix, out = build(tmp_path / "data" / "text", encoded(tokenizer, FIRST)), tmp_path / "out"
    adopted(out, tokenizer, prefix)
    with pytest.raises(UserError, match=f"--out {out}: .*--force"):
        adopted(out, tokenizer, prefix, seed=2)
    assert adopted(out, tokenizer, prefix, seed=2, force=True).options["seed"] == 2
    assert Path(f"{prefix}.bin").is_file()


def damaged(ending: str, change):
    def damage(prefix: Path) -> None:
        file = Path(f"{prefix}.{ending}")
        file.write_bytes(change(file.read_bytes()))

    return damage


def overwritten(place: int, value: bytes):
    return damaged("idx", lambda raw: raw[:place] + value + raw[place + len(value) :])


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda prefix: Path(f"{prefix}.bin").unlink(), r"text\.bin: no such file"),
        (lambda prefix: Path(f"{prefix}.idx").unlink(), r"text\.idx: no such file"),
        (damaged("idx", lambda raw: b""), r"text\.idx: .*header"),
        (damaged("idx", lambda raw: raw[:-8]), r"text\.idx: .*bytes"),
        (damaged("idx", lambda raw: raw + b"x"), r"text\.idx: .*bytes"),
        (overwritten(0, b"P"), r"text\.idx: .*index of Megatron"),
        (overwritten(9, b"\2"), r"text\.idx: .*version 2"),
        (overwritten(17, b"\7"), r"text\.idx: .*float32"),
        (overwritten(17, b"\x2a"), r"text\.idx: .*type 42"),
        (overwritten(34, b"\xff\xff\xff\xff"), r"text\.idx: .*negative"),
        (overwritten(34 + 4 * 60 + 8, b"\1"), r"text\.idx: .*one after another"),
        (overwritten(34 + 12 * 60 + 8, b"\xff"), r"text\.idx: .*documents"),
        (damaged("bin", lambda raw: raw[:-2]), r"text\.bin: .*bytes"),
        (damaged("bin", lambda raw: raw + b"xx"), r"text\.bin: .*bytes"),
        (damaged("bin", lambda raw: b"\xff\xff" + raw[2:]), r"text\.bin: token id 65535 in document 0\b.*--tokenizer"),
        (lambda prefix: build(prefix, [[1, 2], [3]], multimodal=True), r"text\.idx: .*multimodal"),
        (lambda prefix: build(prefix, []), r"text\.idx: no documents"),
        (lambda prefix: build(prefix, [[5, 6, 7]]), r"text\.idx: .*--validation PREFIX"),
    ],
)
def test_damaged_data_is_one_clear_error(tokenizer, tmp_path, damage, says):
    prefix = build(tmp_path / "data" / "text", encoded(tokenizer, FIRST))
    damage(prefix)
    with pytest.raises(UserError, match=says):
        adopted(tmp_path / "out", tokenizer, prefix)
    assert os.listdir(tmp_path) == ["data"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"out": "data/out"}, r"--out .*/data/out: .*/data\b"),
        ({"out": "data"}, r"--out .*/data: "),
        ({"out": "full"}, r"--out .*/full: .*holds something else"),
        ({"validation": ["data/text"]}, r"/data/text: named twice"),
        ({"tokenizer": "nowhere"}, r"--tokenizer .*nowhere: no such"),
        ({"tokenizer": "full"}, r"--tokenizer .*/full: "),
        ({"eos_token": "</s>"}, r"--eos-token </s>: "),
        ({"validation_share": 1.0}, r"--validation-share 1\.0: "),
    ],
)
def test_impossible_adoptions_are_refused(tokenizer, tmp_path, options, says):
    prefix = build(tmp_path / "data" / "text", encoded(tokenizer, FIRST))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    before = content(tmp_path / "data")
    paths = {"tokenizer": tokenizer, "out": tmp_path / "out"}
    for name in ("out", "tokenizer"):
        paths |= {name: tmp_path / options[name]} if name in options else {}
    if "validation" in options:
        options = {"validation": [tmp_path / path for path in options["validation"]]}
    options = {name: value for name, value in options.items() if name not in paths}
    with pytest.raises(UserError, match=says):
        adopt(Adoption(prefixes=[prefix], **paths, **options))
    assert sorted(os.listdir(tmp_path)) == ["data", "full"]
    assert content(tmp_path / "data") == before


def test_a_tokenizer_of_the_same_size_that_is_another_one_is_refused(tokenizer, make_corpus, tmp_path):
    prefix = build(tmp_path / "data" / "text", encoded(tokenizer, FIRST))
    other = make_corpus([text[::-1] for text in SECOND], vocab_size=300) / "tokenizer"
    with pytest.raises(UserError, match=rf"--tokenizer {other}: .*{prefix}"):
        adopted(tmp_path / "out", other, prefix)
    with pytest.raises(UserError, match=r"text\.bin: token id \d+ .*\b257\b.*--tokenizer"):
        adopted(tmp_path / "out", make_corpus(FIRST) / "tokenizer", prefix)


def test_documents_without_eos_are_counted(tokenizer, tmp_path, capsys):
    documents = encoded(tokenizer, FIRST)
    build(tmp_path / "data" / "text", [*documents[:45], *(ids[:-1] for ids in documents[45:])])
    manifest = adopted(tmp_path / "out", tokenizer, tmp_path / "data" / "text")
    assert "25.0% of the documents do not end in <|endoftext|>" in capsys.readouterr().err
    assert sum(split.bytes for split in manifest.splits.values()) == sum(len(text.encode()) for text in FIRST)
    adopted(tmp_path / "whole", tokenizer, build(tmp_path / "data" / "whole", documents))
    assert "warning" not in capsys.readouterr().err
    packed = [documents[number] + documents[number + 1] for number in range(0, 60, 2)]
    adopted(tmp_path / "packed", tokenizer, build(tmp_path / "data" / "packed", packed))
    assert "30 <|endoftext|> tokens inside of documents" in capsys.readouterr().err


def test_held_out_documents_without_text_are_refused(tokenizer, tmp_path):
    prefix = build(tmp_path / "data" / "text", encoded(tokenizer, FIRST))
    empty = build(tmp_path / "data" / "empty", [[EOS], [EOS]])
    with pytest.raises(UserError, match=rf"{empty}: .*held-out"):
        adopted(tmp_path / "out", tokenizer, prefix, validation=[empty])


@pytest.mark.parametrize("documents_have_it", [True, False])
def test_prompts_begin_as_documents_do(tokenizer, tmp_path, capsys, documents_have_it):
    fast = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    fast.add_special_tokens(["<s>"])
    bos = fast.token_to_id("<s>")
    fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    fast.save(str(tmp_path / "tokenizer.json"))
    documents = [[bos] * documents_have_it + ids for ids in encoded(tokenizer, FIRST)]
    prefix = build(tmp_path / "data" / "text", documents)
    manifest = adopted(tmp_path / "out", tmp_path / "tokenizer.json", prefix)
    assert manifest.tokenizer.before_ids == ((bos,) if documents_have_it else ())
    assert ("0.0% of the documents begin so" in capsys.readouterr().err) == (not documents_have_it)
    prompt = Encoder(tmp_path / "out" / "tokenizer", EOS).encode([FIRST[0]])[0]
    assert prompt == documents[0]
    assert open_data(config_of(tmp_path / "out"), None).tokenizer_size == bos + 1


@pytest.mark.parametrize("kind", ["unigram", "added tokens"])
def test_bytes_of_the_text(tokenizer, tmp_path, kind):
    """Of a tokenizer whose tokens are not bytes, and of one with whole words among its added tokens."""
    if kind == "unigram":
        fast = Tokenizer(models.Unigram())
        fast.pre_tokenizer, fast.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        special = ["<unk>", "</s>"]
        trainer = trainers.UnigramTrainer(
            vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False
        )
        fast.train_from_iterator([*FIRST, *SECOND], trainer)
    else:
        fast = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
        fast.add_tokens(["東京 naïve", "tables"])
    fast.save(str(tmp_path / "tokenizer.json"))
    eos = fast.token_to_id("</s>") if kind == "unigram" else EOS
    prefix = build(tmp_path / "data" / "text", Encoder(tmp_path, eos).encode([*FIRST, *SECOND]))
    manifest = adopted(tmp_path / "out", tmp_path / "tokenizer.json", prefix)
    assert sum(split.bytes for split in manifest.splits.values()) == sum(
        len(text.encode()) for text in (*FIRST, *SECOND)
    )


@pytest.mark.parametrize("stopped", ["_scan", "_manifest", "choose_held_out"])
def test_interruption_leaves_nothing(tokenizer, tmp_path, monkeypatch, stopped):
    prefix = build(tmp_path / "data" / "text", encoded(tokenizer, FIRST))
    before = content(tmp_path / "data")

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(adoption, stopped, interrupted)
    with pytest.raises(KeyboardInterrupt):
        adopted(tmp_path / "out", tokenizer, prefix)
    assert os.listdir(tmp_path) == ["data"]
    assert content(tmp_path / "data") == before


def test_data_that_changes_while_it_is_read_is_refused(tokenizer, tmp_path, monkeypatch):
    prefix = build(tmp_path / "data" / "text", encoded(tokenizer, FIRST))
    monkeypatch.setattr(adoption, "_check_round_trip", lambda *_: os.utime(f"{prefix}.idx", (0, 0)))
    with pytest.raises(UserError, match=rf"{prefix}: changed"):
        adopted(tmp_path / "out", tokenizer, prefix)


def test_command_line(tokenizer, tmp_path, capsys):
    prefix = build(tmp_path / "data" / "text", encoded(tokenizer, FIRST))
    words = ["data", "adopt", str(prefix), "--tokenizer", str(tokenizer), "--out", str(tmp_path / "out")]
    assert main([*words, "--validation-share", "0.1"]) == 0
    assert "validation: 6 documents" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "out")]) == 0
    with pytest.raises(SystemExit):
        main([*words, "--force", "--validation", str(prefix), "--validation-share", "0.1"])


@pytest.mark.full
def test_a_run_on_adopted_data(tokenizer, tmp_path, run_config):
    build(tmp_path / "data" / "one", encoded(tokenizer, FIRST))
    build(tmp_path / "data" / "two", encoded(tokenizer, SECOND))
    out = tmp_path / "out"
    adopted(out, tokenizer, tmp_path / "data" / "one", tmp_path / "data" / "two")
    tree, path = run_config(data__sources=[{"path": str(out)}], model__vocab_size=None)
    run = Path(tree["folder"]) / tree["name"]
    for words in (
        ["train", "--config", str(path)],
        ["eval", "--checkpoint", str(run)],
        ["verify", str(run), str(out)],
    ):
        process = start_command(words, os.environ)
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    assert "vocab_size: 300" in (run / "config.yaml").read_text()
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(UserError, match=r"documents\.0\.bin: missing"):
        read_manifest(out)
    assert json.loads((out / "manifest.json").read_text())["options"]["adopted"]
