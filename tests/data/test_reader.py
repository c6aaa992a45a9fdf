import hashlib
import json
import os
import pickle
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from kmem.config import DataConfig, UserError
from kmem.data.batch import IGNORED_LABEL
from kmem.data.blend import Blend
from kmem.data.indexed import IndexedTokens
from kmem.data.manifest import read_manifest
from kmem.data.order import CorpusOrder
from kmem.data.reader import SequenceReader, open_data
from tests.small_corpora import BYTES_AND_EOS, make_texts

FIRST, SECOND = make_texts(60, seed=1), make_texts(25, seed=2, longest=5)


def config_of(*folders: Path, weights: tuple[float, ...] = (), **fields) -> DataConfig:
    weights = weights or (1.0,) * len(folders)
    sources = [{"path": str(folder), "weight": weight} for folder, weight in zip(folders, weights, strict=True)]
    return DataConfig(sources=sources, **{"sequence_length": 32, "seed": 5, **fields})


def same(left, right) -> bool:
    return set(present(left)) == set(present(right)) and all(
        torch.equal(values, getattr(right, name)) for name, values in present(left).items()
    )


def present(batch) -> dict[str, torch.Tensor]:
    return {name: values for name, values in vars(batch).items() if values is not None}


def naive_rows(folder: Path, config: DataConfig, draws: list[int]):
    """The specification, token by token: yields (input_ids, labels, position_ids, document_ids) of each draw."""
    length = config.sequence_length
    indexed, manifest = IndexedTokens(folder / "train"), read_manifest(folder)
    digest = f"{manifest.files['train.bin'].sha256}/{manifest.files['train.idx'].sha256}"
    order = CorpusOrder(indexed.lengths, length, config.seed, digest)
    for draw in draws:
        epoch = order.epoch(draw // order.spans_per_epoch)
        stream = []  # (token, document)
        for place, document in enumerate(epoch.documents):
            start = indexed.starts[document]
            for token in indexed.take(np.arange(start, start + indexed.lengths[document])):
                stream.append((int(token), place))
        begin = epoch.spans[draw % order.spans_per_epoch] * length
        row = stream[begin : begin + length + 1]
        inputs, labels, positions, documents = [], [], [], []
        for here, (token, document) in enumerate(row[:-1]):
            inputs.append(token)
            next_token, next_document = row[here + 1]
            if not config.document_attention:
                labels.append(next_token)
                positions.append(here)
                documents.append(0)
                continue
            labels.append(next_token if next_document == document else IGNORED_LABEL)
            restarts = here == 0 or row[here - 1][1] != document
            positions.append(0 if restarts else positions[-1] + 1)
            documents.append(document - row[0][1])
        yield inputs, labels, positions, documents


@pytest.mark.parametrize("document_attention", [True, False])
@pytest.mark.parametrize("sequence_length", [1, 7, 32, 200])
def test_equals_the_naive_reference(make_corpus, document_attention, sequence_length):
    folder = make_corpus(FIRST)
    config = config_of(folder, document_attention=document_attention, sequence_length=sequence_length)
    reader = SequenceReader(config, "train")
    samples = [0, 1, 2, len(reader) - 1, len(reader), 3 * len(reader) + 2]
    batch = reader.read(samples)
    assert batch.addresses is None
    for values in present(batch).values():
        assert values.dtype == torch.int64
        assert values.shape == (len(samples), sequence_length)
    for row, expected in enumerate(naive_rows(folder, config, samples)):
        for name, values in zip(("input_ids", "labels", "position_ids", "document_ids"), expected, strict=True):
            assert getattr(batch, name)[row].tolist() == values, name


def test_a_sample_is_a_pure_function_of_its_number(make_corpus):
    config = config_of(make_corpus(FIRST), make_corpus(SECOND), weights=(0.8, 0.2))
    together = SequenceReader(config, "train").read(range(400))
    reader = SequenceReader(config, "train")
    for sample in (399, 3, 250, 17, 0):
        alone = reader.read([sample])
        assert torch.equal(alone.input_ids[0], together.input_ids[sample])
        assert torch.equal(alone.labels[0], together.labels[sample])
    assert same(reader.read([5, 5, 4]), reader.read(np.array([5, 5, 4])))


def test_ranks_and_micro_batches_split_a_step_without_overlap(make_corpus):
    config = config_of(make_corpus(FIRST))
    step = SequenceReader(config, "train").read(range(16, 32))
    parts = [SequenceReader(config, "train").read(range(16 + rank, 32, 4)) for rank in range(4)]
    joined = torch.stack([part.input_ids for part in parts], dim=1).reshape(16, -1)
    assert torch.equal(joined, step.input_ids)


def test_every_span_once_per_epoch_and_new_orders_after(make_corpus):
    reader = SequenceReader(config_of(make_corpus(FIRST), document_attention=False), "train")
    count = len(reader)
    indexed = reader._sources[0].indexed
    stored = np.bincount(indexed.take(np.arange(indexed.lengths.sum())), minlength=BYTES_AND_EOS)
    epochs = []
    for epoch in range(3):
        batch = reader.read(range(epoch * count, (epoch + 1) * count))
        rows = {tuple(row.tolist()) for row in batch.input_ids}
        assert len(rows) == count
        epochs.append(rows)
        # Together the spans are the whole corpus up to less than a span at the end.
        left_out = stored - np.bincount(batch.input_ids.flatten().numpy(), minlength=BYTES_AND_EOS)
        assert left_out.min() >= 0
        assert left_out.sum() <= 32
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_source_is_read_in_its_own_order_whatever_it_is_blended_with(make_corpus):
    first, second = make_corpus(FIRST), make_corpus(SECOND)
    alone = SequenceReader(config_of(first), "train")
    blended = SequenceReader(config_of(second, first, weights=(0.4, 0.6)), "train")
    source, draw = Blend([0.4, 0.6]).locate(np.arange(300))
    batch = blended.read(range(300))
    mine = source == 1
    assert torch.equal(batch.input_ids[torch.from_numpy(mine)], alone.read(draw[mine]).input_ids)


def test_validation_holds_every_token_once_in_natural_order(make_corpus):
    folders = [make_corpus(FIRST, validation_share=0.2), make_corpus(SECOND, validation_share=0.2)]
    config = config_of(*folders, document_attention=False)
    reader = SequenceReader(config, "validation")
    batch = reader.read(range(len(reader)))
    expected = []
    for folder in folders:
        indexed = IndexedTokens(folder / "validation")
        expected += indexed.take(np.arange(indexed.lengths.sum()))[1:].tolist()
    assert batch.labels[batch.labels != IGNORED_LABEL].tolist() == expected
    with pytest.raises(IndexError):
        reader.read([len(reader)])


def test_padding_is_a_document_without_labels(make_corpus):
    folder = make_corpus(SECOND, validation_share=0.04)  # one document, shorter than a sequence
    reader = SequenceReader(config_of(folder, sequence_length=512), "validation")
    assert len(reader) == 1
    batch = reader.read([0])
    tokens = int(IndexedTokens(folder / "validation").lengths.sum())
    assert (batch.labels[0] != IGNORED_LABEL).nonzero().flatten().tolist() == list(range(tokens - 1))
    assert batch.document_ids[0].tolist() == [0] * tokens + [1] * (512 - tokens)
    assert batch.position_ids[0].tolist() == [*range(tokens), *range(512 - tokens)]


def test_spread_takes_the_same_share_of_every_source(make_corpus):
    config = config_of(make_corpus(FIRST, validation_share=0.5), make_corpus(SECOND, validation_share=0.5))
    reader = SequenceReader(config, "validation")
    assert reader.spread(None) == reader.spread(10**6) == list(range(len(reader)))
    chosen = reader.spread(10)
    assert len(set(chosen)) == 10
    large = int(reader._ends[1])
    assert abs(sum(sample < large for sample in chosen) - 10 * large / len(reader)) <= 1


def test_resuming_far_into_a_run_is_quick(make_corpus):
    config = config_of(make_corpus(FIRST), make_corpus(SECOND), weights=(0.777, 0.223))
    begin = time.monotonic()
    SequenceReader(config, "train").read(range(10**8, 10**8 + 64))
    assert time.monotonic() - begin < 1.0


def test_open_data_describes_the_run(make_corpus):
    first, second = make_corpus(FIRST, validation_share=0.2), make_corpus(SECOND, validation_share=0.2)
    data = open_data(config_of(first, second), model_vocab_size=BYTES_AND_EOS)
    splits = [read_manifest(folder).splits["validation"] for folder in (first, second)]
    # One token per byte, and an EOS.
    assert all(split.tokens == split.bytes + split.documents for split in splits)
    expected = sum(split.bytes for split in splits) / sum(split.tokens for split in splits)
    assert data.bytes_per_token_validation == pytest.approx(expected)
    assert (data.tokenizer_path / "tokenizer.json").is_file()
    assert len(data.training.read([0]).input_ids) == 1


def test_fingerprint_follows_the_data_and_the_order(make_corpus, tmp_path):
    first, second = make_corpus(FIRST), make_corpus(SECOND)
    moved = shutil.copytree(first, tmp_path / "moved")

    def fingerprint(config: DataConfig) -> str:
        return open_data(config, BYTES_AND_EOS).fingerprint

    base = fingerprint(config_of(first))
    assert fingerprint(config_of(moved)) == base
    others = [
        config_of(second),
        config_of(first, seed=6),
        config_of(first, sequence_length=31),
        config_of(first, document_attention=False),
        config_of(first, second),
        config_of(first, second, weights=(2, 1)),
        config_of(second, first),
    ]
    assert len({base, *map(fingerprint, others)}) == len(others) + 1


def _damage_nothing(folder: Path) -> None:
    pass


def _drop_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def _cut(name: str):
    def damage(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[:-2])

    return damage


def _edit_manifest(**changes):
    def damage(folder: Path) -> None:
        path = folder / "manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


def _swap_splits(folder: Path) -> None:
    for ending in ("bin", "idx"):
        train, validation = (folder / f"{split}.{ending}" for split in ("train", "validation"))
        content = train.read_bytes()
        train.write_bytes(validation.read_bytes())
        validation.write_bytes(content)


def _lengthen_document(folder: Path) -> None:
    path = folder / "train.idx"
    raw = bytearray(path.read_bytes())
    raw[34:38] = (10_000).to_bytes(4, "little")  # the first document's length
    path.write_bytes(bytes(raw))


def _garble_index(folder: Path) -> None:
    path = folder / "train.idx"
    path.write_bytes(b"x" * path.stat().st_size)


def _digested(damage):
    """Damage with the sizes and digests that it would have had from the beginning."""

    def damage_and_digest(folder: Path) -> None:
        damage(folder)
        path = folder / "manifest.json"
        manifest = json.loads(path.read_text())
        for name, record in manifest["files"].items():
            content = (folder / name).read_bytes()
            record |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        path.write_text(json.dumps(manifest))

    return damage_and_digest


def _flip(name: str, place: int = -1):
    def damage(folder: Path) -> None:
        raw = bytearray((folder / name).read_bytes())
        raw[place] ^= 1
        (folder / name).write_bytes(raw)

    return damage


def _zero(folder: Path) -> None:
    path = folder / "train.bin"
    path.write_bytes(bytes(path.stat().st_size))


def _other_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer" / "tokenizer.json"
    tree = json.loads(path.read_text())
    tree["normalizer"] = {"type": "Lowercase"}
    path.write_text(json.dumps(tree))


@pytest.mark.parametrize(
    ("damage", "fields", "says"),
    [
        (shutil.rmtree, {}, r"/corpus: .*kmem data prepare"),
        (_drop_manifest, {}, r"manifest\.json: missing.*kmem data prepare"),
        (_cut("train.bin"), {}, r"train\.bin: .*expected .*bytes"),
        (_cut("train.idx"), {}, r"train\.idx: .*expected .*bytes"),
        (_cut("validation.bin"), {}, r"validation\.bin: .*expected .*bytes"),
        (lambda folder: (folder / "validation.idx").unlink(), {}, r"validation\.idx: missing"),
        (_digested(_lengthen_document), {}, r"train\.bin, .*train\.idx: .*Megatron"),
        (_digested(_garble_index), {}, r"train\.bin, .*train\.idx: .*Megatron"),
        (_digested(_swap_splits), {}, r"train\.idx: .*\bdocuments?\b.*manifest\.json"),
        (_zero, {}, r"train\.bin: damaged"),
        (_flip("train.bin", 6), {}, r"train\.bin: damaged"),
        (_flip("train.idx"), {}, r"train\.idx: damaged"),
        (_flip("validation.bin"), {}, r"validation\.bin: damaged"),
        (_edit_manifest(version=99), {}, r"manifest\.json: .*version 99\b"),
        (_edit_manifest(splits={"train": {}}), {}, r"manifest\.json: .*\bsplits\.train\b"),
        (lambda folder: (folder / "manifest.json").write_text("{"), {}, r"manifest\.json: .*\bprepared data\b"),
        (_other_tokenizer, {}, r"tokenizer\.json: .*manifest\.json"),
        (lambda folder: (folder / "tokenizer" / "tokenizer.json").unlink(), {}, r"tokenizer\.json: missing"),
        (_damage_nothing, {"sequence_length": 10**6}, r"/corpus: .*training tokens.*data\.sequence_length=1000000\b"),
    ],
)
def test_unusable_data_is_one_clear_error(make_corpus, tmp_path, damage, fields, says):
    folder = shutil.copytree(make_corpus(FIRST), tmp_path / "corpus")
    damage(folder)
    with pytest.raises(UserError, match=says):
        open_data(config_of(folder, **fields), BYTES_AND_EOS)


def test_a_token_id_beyond_the_vocabulary_names_the_file(make_corpus, tmp_path):
    folder = shutil.copytree(make_corpus(FIRST), tmp_path / "corpus")
    reader = open_data(config_of(folder), BYTES_AND_EOS).training
    with open(folder / "train.bin", "r+b") as file:  # under the eyes of a run
        file.write(b"\xff" * 2000)
    with pytest.raises(UserError, match=r"train\.bin: token id \d+\b.*\b257\b"):
        reader.read(range(len(reader)))


def test_data_is_compared_once_and_after_every_change(make_corpus, tmp_path, monkeypatch):
    from kmem.data import verified_files

    folder, read = shutil.copytree(make_corpus(FIRST), tmp_path / "corpus"), []
    digest = verified_files.file_digest
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(verified_files, "file_digest", lambda path: read.append(path.name) or digest(path))

    def compared():
        verified_files._verified.clear()  # as in another process
        read.clear()
        read_manifest(folder)
        return sorted(read)

    assert compared() == ["train.bin", "train.idx", "validation.bin", "validation.idx"]
    assert compared() == []
    path = folder / "train.bin"
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    assert compared() == ["train.bin"]
    monkeypatch.setenv("LOCAL_RANK", "1")
    os.utime(path, ns=(0, 0))
    assert compared() == []
    monkeypatch.setenv("LOCAL_RANK", "0")
    (tmp_path / "cache" / "kmem" / "verified.json").write_text("[[1]]")
    assert len(compared()) == 4


def test_a_model_smaller_than_the_tokenizer_is_refused(make_corpus):
    with pytest.raises(UserError, match=r"model\.vocab_size: 256 .*\b257\b.*/tokenizer"):
        open_data(config_of(make_corpus(FIRST)), 256)


def test_sources_with_different_tokenizers_are_refused(make_corpus):
    first, second = make_corpus(FIRST), make_corpus(SECOND, vocab_size=280)
    with pytest.raises(UserError, match=rf"data\.sources: .*{second}.*{first}.*--tokenizer {first / 'tokenizer'}"):
        open_data(config_of(first, second), 300)
    shared = make_corpus(SECOND, tokenizer=first / "tokenizer")
    assert open_data(config_of(first, shared), 300).training.read([0]).input_ids.shape == (1, 32)


def test_nothing_is_unpickled(make_corpus, monkeypatch):
    folder = make_corpus(FIRST)
    IndexedTokens(folder / "train")  # imports done

    def refuse(*arguments, **options):
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    assert open_data(config_of(folder), BYTES_AND_EOS).training.read([0]).input_ids.shape == (1, 32)
