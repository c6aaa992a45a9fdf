import argparse
import errno
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from kmem.config import UserError
from kmem.data import command
from kmem.data import prepare as preparation
from kmem.data.documents import Reading
from kmem.data.indexed import IndexedTokens, IndexedWriter, token_dtype
from kmem.data.manifest import Manifest, read_manifest
from kmem.data.prepare import Preparation, prepare
from tests.small_corpora import BYTES_AND_EOS, make_texts, write_jsonl
from tests.warm_processes import WITH_KMEM, start_program

ROOT = Path(__file__).parents[2]
TEXTS = make_texts(120, seed=4)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "texts.jsonl", TEXTS)


def prepared(out: Path, *inputs: Path, **options) -> Manifest:
    if "tokenizer" not in options:
        options.setdefault("vocab_size", BYTES_AND_EOS)
    return prepare(Preparation(inputs=inputs, out=out, **options))


def stored_texts(folder: Path, split: str) -> list[str]:
    """Documents read with Megatron's own reader and the saved tokenizer."""
    from transformers import AutoTokenizer

    from tests.data.megatron import IndexedDataset

    tokenizer = AutoTokenizer.from_pretrained(str(folder / "tokenizer"), local_files_only=True)
    dataset = IndexedDataset(str(folder / split))
    assert np.array_equal(dataset.document_indices, np.arange(len(dataset) + 1))
    texts = []
    for ids in dataset[0 : len(dataset)]:
        assert ids[-1] == tokenizer.eos_token_id
        texts.append(tokenizer.decode(ids[:-1].tolist(), skip_special_tokens=False))
    return texts


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def command_line(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(argument) for argument in arguments]))


def test_megatron_reads_every_text_back(source, tmp_path):
    manifest = prepared(tmp_path / "out", source, vocab_size=400, validation_share=0.1)
    train, validation = (stored_texts(tmp_path / "out", split) for split in ("train", "validation"))
    assert sorted(train + validation) == sorted(TEXTS)
    assert [text for text in TEXTS if text in set(train)] == train  # the order of the input
    assert len(validation) == 12
    assert read_manifest(tmp_path / "out") == manifest


@pytest.mark.parametrize("vocabulary", [65_499, 65_500])
def test_files_are_those_of_megatrons_own_builder(tmp_path, vocabulary):
    from tests.data.megatron import DType, IndexedDatasetBuilder

    dtype = DType.optimal_dtype(vocabulary)
    assert token_dtype(vocabulary) == np.dtype(dtype).name
    draw = np.random.default_rng(0)
    ours = IndexedWriter(tmp_path / "ours", token_dtype(vocabulary))
    theirs = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype)
    for length in (3, 1, 1000):
        ids = draw.integers(vocabulary, size=length)
        ours.add(ids)
        theirs.add_document(ids, [length])
    ours.close()
    theirs.finalize(str(tmp_path / "theirs.idx"))
    for ending in ("bin", "idx"):
        assert (tmp_path / f"ours.{ending}").read_bytes() == (tmp_path / f"theirs.{ending}").read_bytes()


def test_the_manifest_counts_what_is_there(source, tmp_path):
    manifest = prepared(tmp_path / "out", source, vocab_size=300)
    for split in ("train", "validation"):
        record, indexed = manifest.splits[split], IndexedTokens(tmp_path / "out" / split)
        texts = stored_texts(tmp_path / "out", split)
        assert record.documents == len(texts) == len(indexed.lengths)
        assert record.tokens == indexed.lengths.sum()
        assert record.bytes == sum(len(text.encode()) for text in texts)
        assert (tmp_path / "out" / f"{split}.bin").stat().st_size == 2 * record.tokens
    assert manifest.dtype == "uint16"
    (only,) = manifest.sources
    assert (only.path, only.bytes, only.documents) == (str(source), source.stat().st_size, len(TEXTS))
    assert manifest.skipped.count == 0
    assert manifest.tokenizer.size == 300


def test_large_vocabularies_are_stored_in_four_bytes(source, tmp_path):
    prepared(tmp_path / "small", source)
    tree = json.loads((tmp_path / "small" / "tokenizer" / "tokenizer.json").read_text())
    tree["added_tokens"].append({**tree["added_tokens"][0], "id": 70_000, "content": "<|far|>"})
    tree["model"]["vocab"]["<|far|>"] = 70_000
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    manifest = prepared(tmp_path / "out", source, tokenizer=tmp_path / "tokenizer.json")
    assert (manifest.tokenizer.size, manifest.dtype) == (70_001, "int32")
    assert sorted(stored_texts(tmp_path / "out", "train")) == sorted(stored_texts(tmp_path / "small", "train"))


def test_the_result_does_not_depend_on_workers_or_repetition(tmp_path):
    sources = [
        write_jsonl(tmp_path / "a.jsonl", TEXTS[:70]),
        write_jsonl(tmp_path / "b.jsonl", make_texts(2500, seed=1)),  # several batches
    ]
    (tmp_path / "c.txt").write_text("\n".join(TEXTS[70:]))
    inputs = [*sources, tmp_path / "c.txt"]
    results = [prepared(tmp_path / f"out{workers}", *inputs, vocab_size=500, workers=workers) for workers in (1, 2)]
    assert results[0] == results[1]
    assert content(tmp_path / "out1") == content(tmp_path / "out2")


def test_held_out_documents_follow_the_seed_and_there_is_always_one(source, tmp_path):
    held_out = {}
    for seed in (1, 2):
        for share in (0.0001, 0.25):
            out = tmp_path / f"{seed}-{share}"
            prepared(out, source, seed=seed, validation_share=share)
            held_out[seed, share] = stored_texts(out, "validation")
    assert len(held_out[1, 0.0001]) == 1
    assert len(held_out[1, 0.25]) == 30
    assert held_out[1, 0.25] != held_out[2, 0.25]
    two = write_jsonl(tmp_path / "two.jsonl", ["a", "b"])
    splits = prepared(tmp_path / "two", two, validation_share=0.99).splits
    assert (splits["train"].documents, splits["validation"].documents) == (1, 1)


def test_a_tokenizer_is_not_trained_on_held_out_documents(tmp_path):
    texts = [f"{chr(97 + number)}" * 40 for number in range(20)]
    prepared(tmp_path / "out", write_jsonl(tmp_path / "texts.jsonl", texts), vocab_size=300)
    (held_out,) = stored_texts(tmp_path / "out", "validation")
    vocabulary = json.loads((tmp_path / "out" / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
    assert held_out[:2] not in vocabulary
    assert sum(text[:2] in vocabulary for text in texts) == 19


def test_the_tokenizer_sample_takes_its_share_of_every_file(tmp_path):
    files = [write_jsonl(tmp_path / f"{letter}.jsonl", [letter * 50] * 100) for letter in "abc"]
    prepared(tmp_path / "out", *files, vocab_size=400, tokenizer_sample=1500)
    vocabulary = json.loads((tmp_path / "out" / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
    assert all(letter * 2 in vocabulary for letter in "abc")


@pytest.mark.parametrize("bad", ['{"text"', '{"body": "x"}', '{"text": ""}'])
@pytest.mark.parametrize("workers", [1, 2])
def test_bad_records_stop_or_are_skipped_and_counted(tmp_path, bad, workers):
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:9]) + bad + "\n")
    with pytest.raises(UserError, match=r"texts\.jsonl, line 10: .*--on-error skip"):
        prepared(tmp_path / "out", source, workers=workers)
    assert os.listdir(tmp_path) == ["texts.jsonl"]
    manifest = prepared(tmp_path / "out", source, workers=workers, on_error="skip")
    assert manifest.skipped.count == sum(manifest.skipped.reasons.values()) == 1
    assert "line 10" in manifest.skipped.examples[0]
    assert sum(split.documents for split in manifest.splits.values()) == 9


def test_a_damaged_archive_gives_what_comes_before_the_damage_when_skipping(tmp_path):
    whole = "".join(json.dumps({"text": text}) + "\n" for text in make_texts(3000, seed=0)).encode()
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(whole)[:-2000])
    manifest = prepared(tmp_path / "out", tmp_path / "cut.jsonl.gz", on_error="skip")
    assert manifest.skipped.reasons == {"corrupt file": 1}
    assert 0 < manifest.sources[0].documents < 3000


@pytest.mark.parametrize(
    ("texts", "options", "says"),
    [
        ([], {"on_error": "skip"}, r"texts\.jsonl: no documents"),
        (["only one"], {}, r"texts\.jsonl: .*--documents"),
        (["a", "b"], {"validation_share": 0.0}, r"--validation-share 0\.0: .*\b0 and 1\b"),
        (["a", "b"], {"validation_share": 1.0}, r"--validation-share 1\.0: .*\b0 and 1\b"),
        (["a", "b"], {"workers": 0}, "--workers 0: "),
        (["a", "b"], {"vocab_size": None}, "--tokenizer .*--vocab-size"),
        (["a", "b"], {"vocab_size": 100}, r"--vocab-size 100: .*\b257\b"),
        (["a", "b"], {"tokenizer": Path("nowhere")}, "--tokenizer nowhere: no such"),
    ],
)
def test_impossible_preparations_are_refused(tmp_path, texts, options, says):
    source = write_jsonl(tmp_path / "texts.jsonl", texts)
    with pytest.raises(UserError, match=says):
        prepared(tmp_path / "out", source, **options)
    assert os.listdir(tmp_path) == ["texts.jsonl"]


def test_a_finished_folder_is_replaced_only_by_force(source, tmp_path):
    out = tmp_path / "out"
    prepared(out, source)
    before = content(out)
    with pytest.raises(UserError, match=f"--out {out}: .*--force"):
        prepared(out, source, seed=2)
    assert content(out) == before
    with pytest.raises(UserError, match=r"bad\.jsonl, line 1: "):  # a failing replacement leaves the old one
        prepared(out, write_jsonl(tmp_path / "bad.jsonl", [""]), force=True)
    assert content(out) == before
    prepared(out, source, seed=2, force=True)
    assert content(out).keys() == before.keys()
    assert read_manifest(out).options["seed"] == 2
    assert sorted(os.listdir(tmp_path)) == ["bad.jsonl", "out", "texts.jsonl"]


def test_other_peoples_folders_are_never_replaced(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "manifest.json").write_text('{"name": "a web application"}')
    with pytest.raises(UserError, match=rf"--out {out}: .*prepared data\b"):
        prepared(out, source, force=True)
    assert content(out).keys() == {"manifest.json"}
    (tmp_path / "empty").mkdir()
    prepared(tmp_path / "empty", source)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=rf"--out {tmp_path / 'file'}: .*\bfile\b"):
        prepared(tmp_path / "file", source)


def test_two_preparations_of_one_folder_exclude_each_other(source, tmp_path, monkeypatch):
    choose = preparation.choose_held_out

    def meanwhile(*arguments):
        with pytest.raises(UserError, match=rf"{tmp_path / 'out'}.*another process"):
            prepared(tmp_path / "out", source)
        return choose(*arguments)

    monkeypatch.setattr(preparation, "choose_held_out", meanwhile)
    prepared(tmp_path / "out", source)
    assert read_manifest(tmp_path / "out").splits["train"].documents > 0


def test_a_full_disk_is_one_clear_error(source, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(preparation, "_manifest", full)
    with pytest.raises(UserError, match=f"{tmp_path / 'out'}: .*{os.strerror(errno.ENOSPC)}"):
        prepared(tmp_path / "out", source)
    assert os.listdir(tmp_path) == ["texts.jsonl"]


STALLING = """
import sys, time
from pathlib import Path
from kmem.data import prepare as module

def stall(*arguments):
    print("ready", flush=True)
    time.sleep(60)

if __name__ == "__main__":
    setattr(module, sys.argv[1], stall)
    source, out = map(Path, sys.argv[2:])
    module.prepare(module.Preparation(inputs=[source], out=out, vocab_size=300, workers=2))
"""


@pytest.mark.parametrize("stalled", ["_tokenizer", "_manifest"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("start", ["forked", pytest.param("executed", marks=pytest.mark.full)])
def test_interruption_leaves_nothing_that_looks_finished(source, tmp_path, stalled, how, start):
    program, out = tmp_path / "program.py", tmp_path / "out"
    program.write_text(STALLING)
    words = [stalled, str(source), str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if start == "forked":  # from a process that has imported everything
        process = start_program(WITH_KMEM, program, words, environment, ROOT)
    else:
        process = subprocess.Popen(
            [sys.executable, str(program), *words],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment,
        )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    children = _children(process.pid)
    assert len(children) >= (1 if start == "forked" else 2)  # a worker; a new interpreter also has a resource tracker
    process.send_signal(how)
    process.communicate(timeout=30)
    assert process.returncode != 0
    _wait_until(lambda: not any(Path(f"/proc/{child}").exists() for child in children))
    assert not out.exists()
    leftover = tmp_path / "out.partial"
    assert leftover.exists() == (how == signal.SIGKILL)
    assert not (leftover / "manifest.json").exists()
    prepared(out, source)
    assert not leftover.exists()
    assert sorted(path.name for path in out.iterdir()) == [
        "manifest.json",
        "tokenizer",
        "train.bin",
        "train.idx",
        "validation.bin",
        "validation.idx",
    ]


def _children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def _wait_until(condition) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_command_line(source, tmp_path, capsys):
    source.write_text(source.read_text() + '{"text": ""}\n')
    out = tmp_path / "out"
    arguments = [source, "--out", out, "--vocab-size", 5000, "--workers", 1, "--on-error", "skip"]
    assert command_line(*arguments) == 0
    said = capsys.readouterr().out
    assert "train: 118 documents" in said
    assert "validation: 2 documents" in said
    assert "--vocab-size 5000" in said
    assert "1 record: 1 empty" in said
    assert f"{source}, line 121: " in said


def test_command_line_cuts_plain_text(tmp_path, capsys):
    (tmp_path / "book.txt").write_text("one\n\ntwo\nlines\n\nthree")
    arguments = [tmp_path / "book.txt", "--out", tmp_path / "out", "--vocab-size", 257, "--workers", 1]
    with pytest.raises(UserError, match=r"book\.txt: .*--documents"):
        command_line(*arguments)
    assert command_line(*arguments, "--documents", "blank-line") == 0
    stored = stored_texts(tmp_path / "out", "train") + stored_texts(tmp_path / "out", "validation")
    assert sorted(stored) == ["one", "three", "two\nlines"]
    assert read_manifest(tmp_path / "out").options["documents"] == Reading(documents="blank-line").documents
