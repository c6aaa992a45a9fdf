import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from kmem.config import DataConfig, UserError
from kmem.config.data import AddressesConfig
from kmem.data.bank_addresses import write_addresses
from kmem.data.batch import IGNORED_LABEL
from kmem.data.indexed import IndexedTokens
from kmem.data.leaf_order import LeafOrder
from kmem.data.manifest import read_manifest
from kmem.data.reader import SequenceReader, open_data
from kmem.model.bank_tree import read_tree_record
from tests.clustering.cluster_case import give_addresses, units_of, write_tree
from tests.small_corpora import BYTES_AND_EOS, make_texts, with_addresses

TEXTS = make_texts(60, seed=1)
EOS = 0
FIELDS = ("input_ids", "labels", "position_ids", "document_ids")


@pytest.fixture
def addressed(make_corpus, tmp_path):
    """addressed(unit, texts) -> (a prepared folder with addresses, its tree)."""

    def make(unit: str = "document", texts: list[str] = TEXTS, name: str = "data") -> tuple[Path, Path]:
        folder, tree = tmp_path / name, write_tree(tmp_path / f"tree-{unit}", 2, 2, unit)
        shutil.copytree(make_corpus(texts, validation_share=0.2), folder)
        give_addresses(folder, tree)
        return folder, tree

    return make


def config_of(*folders: Path, **fields) -> DataConfig:
    sources = [{"path": str(folder)} for folder in folders]
    return DataConfig(sources=sources, **{"sequence_length": 32, "seed": 5, **fields})


def stored(folder: Path, split: str, unit: str):
    """Of every unit: its tokens, its leaf, and the token after it in its document (IGNORED_LABEL at its end)."""
    indexed, units = IndexedTokens(folder / split), units_of(folder, split, unit)
    leaves = np.load(folder / f"{split}.addresses.npy")
    for start, length, leaf, goes_on in zip(units.starts, units.lengths, leaves, units.continued(), strict=True):
        tokens = indexed.take(np.arange(start, start + length + goes_on)).tolist()
        yield tokens[:length], int(leaf), tokens[length] if goes_on else IGNORED_LABEL


@pytest.mark.parametrize("unit", ["document", "window:20"])
@pytest.mark.parametrize("document_attention", [True, False])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_packed_sequences_are_those_of_a_run_without_addresses(addressed, unit, document_attention, split):
    folder, tree = addressed(unit)
    config = config_of(folder, document_attention=document_attention)
    plain, reader = SequenceReader(config, split), SequenceReader(with_addresses(config, tree), split)
    samples = range(len(plain) * (2 if split == "train" else 1))
    before, after = plain.read(samples), reader.read(samples)
    assert before.addresses is None
    assert len(reader) == len(plain)
    for name in FIELDS:
        assert torch.equal(getattr(before, name), getattr(after, name))
    assert after.addresses.dtype == torch.int64
    if split == "validation":  # natural order: the addresses follow one another as the units do
        expected = [leaf for tokens, leaf, _ in stored(folder, split, unit) for _ in tokens]
        rows = after.addresses.flatten().tolist()
        assert rows[: len(expected)] == expected[: len(rows)]
        assert set(rows[len(expected) :]) <= {expected[-1]}  # padding fetches nothing more


def test_packed_addresses_are_those_of_the_documents(addressed):
    folder, tree = addressed()
    config = config_of(folder, sequence_length=256)
    reader = SequenceReader(with_addresses(config, tree), "train")
    by_text = {tuple(tokens): leaf for tokens, leaf, _ in stored(folder, "train", "document")}
    batch, found = reader.read(range(len(reader))), 0
    for row in range(len(batch.input_ids)):
        documents = batch.document_ids[row]
        for document in documents.unique():
            here = documents == document
            assert len(batch.addresses[row][here].unique()) == 1
            tokens = tuple(batch.input_ids[row][here].tolist())
            if tokens in by_text:
                found += 1
                assert batch.addresses[row][here][0] == by_text[tokens]
    assert found > 10


@pytest.mark.parametrize("unit", ["document", "window:20"])
@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("sequence_length", [8, 32, 500])
def test_sequences_of_a_leaf_hold_each_of_its_units_once(addressed, unit, split, sequence_length):
    folder, tree = addressed(unit)
    reader = SequenceReader(with_addresses(config_of(folder, sequence_length=sequence_length), tree, "leaf"), split)
    units = list(stored(folder, split, unit))
    expected = Counter()  # (leaf, token, label) of every token
    for tokens, leaf, following in units:
        expected.update(zip([leaf] * len(tokens), tokens, [*tokens[1:], following], strict=True))
    total = sum(len(tokens) for tokens, _, _ in units)
    per_leaf = Counter()
    for tokens, leaf, _ in units:
        per_leaf[leaf] += len(tokens)
    assert len(reader) == sum(-(-count // sequence_length) for count in per_leaf.values())
    assert reader.padding == len(reader) * sequence_length - total
    orders = []
    for epoch in range(2 if split == "train" else 1):
        batch = reader.read(range(epoch * len(reader), (epoch + 1) * len(reader)))
        assert bool((batch.addresses == batch.addresses[:, :1]).all())
        # A padded position is an EOS without a label in a document of its own; a document's own EOS has none either.
        flat = zip(
            batch.addresses.flatten().tolist(),
            batch.input_ids.flatten().tolist(),
            batch.labels.flatten().tolist(),
            strict=True,
        )
        extra = Counter(flat)
        extra.subtract(expected)
        assert {key[1:] for key, count in extra.items() if count} <= {(EOS, IGNORED_LABEL)}
        assert min(extra.values()) >= 0
        assert sum(extra.values()) == reader.padding
        orders.append(batch.input_ids)
    if split == "train" and sequence_length < 500:
        assert not torch.equal(orders[0], orders[1])


@pytest.mark.parametrize("unit", ["document", "window:20"])
def test_units_of_a_leaf_are_packed_whole(addressed, unit):
    folder, tree = addressed(unit)
    reader = SequenceReader(with_addresses(config_of(folder, sequence_length=256), tree, "leaf"), "train")
    units = {tuple(tokens) for tokens, _, _ in stored(folder, "train", unit)}
    batch = reader.read(range(len(reader)))
    whole = 0
    for ids, documents, positions in zip(batch.input_ids, batch.document_ids, batch.position_ids, strict=True):
        assert documents.diff().min() >= 0
        for document in documents.unique():
            here = documents == document
            assert positions[here].tolist() == list(range(int(here.sum())))
            whole += tuple(ids[here].tolist()) in units
    assert whole > len(units) // 4


def test_the_order_of_leaves_is_a_function_of_seed_and_epoch(addressed):
    folder, tree = addressed()
    config = with_addresses(config_of(folder), tree, "leaf")
    reader = SequenceReader(config, "train")
    together = reader.read(range(100))
    again = SequenceReader(config, "train")
    for sample in (99, 0, 57):
        alone = again.read([sample])
        for name in (*FIELDS, "addresses"):
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[sample])
    other = SequenceReader(with_addresses(config_of(folder, seed=6), tree, "leaf"), "train")
    assert not torch.equal(other.read(range(100)).input_ids, together.input_ids)
    # Leaves alternate: the sequences of all of them are shuffled together.
    leaves = together.addresses[: len(reader), 0]
    assert int((leaves.diff() != 0).sum()) > len(reader) // 3


GOLDEN = "0bc093b29cb68146eb25b5ca4906f079b04af25353cf3ebcbce9510b1fdb289b"


def test_leaf_order_does_not_depend_on_numpy():
    draw = np.random.Generator(np.random.Philox(key=1)).bit_generator.random_raw(400)
    lengths, leaves = (draw[:200] % 60 + 1).astype(np.int64), (draw[200:] % 9).astype(np.int32)
    epoch = LeafOrder(lengths, leaves, 16, 7, "corpus").epoch(3)
    joined = b"".join(part.astype("<i8").tobytes() for part in (epoch.documents, epoch.offsets, epoch.spans))
    assert hashlib.sha256(joined).hexdigest() == GOLDEN


def test_blended_sources_have_addresses_of_one_tree(addressed):
    first, tree = addressed()
    second, _ = addressed(texts=make_texts(40, seed=3), name="second")
    config = config_of(first, second)
    for batching in ("packed", "leaf"):
        data = open_data(with_addresses(config, tree, batching), BYTES_AND_EOS)
        batch = data.training.read(range(60))
        assert batch.addresses.shape == batch.input_ids.shape
        assert set(batch.addresses.unique().tolist()) == {0, 1, 2, 3}
        data.validation.read(range(len(data.validation)))


def test_fingerprints_tell_addresses_and_batching_apart(addressed):
    folder, tree = addressed()
    config = config_of(folder)
    found = [
        open_data(with_or_without, BYTES_AND_EOS).fingerprint
        for with_or_without in (config, with_addresses(config, tree), with_addresses(config, tree, "leaf"))
    ]
    assert len(set(found)) == 3
    other = write_tree(tree.with_name("other"), 2, 1)
    give_addresses(folder, other)
    assert open_data(with_addresses(config, other), BYTES_AND_EOS).fingerprint not in found
    assert open_data(config, BYTES_AND_EOS).fingerprint == found[0]


def test_one_other_address_is_other_data(addressed):
    """As a tree applied anew may give: sequences of leaves then differ, and a run on them does not go on."""
    folder, tree = addressed()
    leaves = {split: np.load(folder / f"{split}.addresses.npy") for split in ("train", "validation")}
    before = [open_data(with_addresses(config_of(folder), tree, way), BYTES_AND_EOS) for way in ("packed", "leaf")]
    leaves["train"][5] = (leaves["train"][5] + 1) % 4
    write_addresses(folder, read_manifest(folder), read_tree_record(tree), leaves)
    after = [open_data(with_addresses(config_of(folder), tree, way), BYTES_AND_EOS) for way in ("packed", "leaf")]
    assert all(old.fingerprint != new.fingerprint for old, new in zip(before, after, strict=True))
    assert [old.sequences_fingerprint == new.sequences_fingerprint for old, new in zip(before, after, strict=True)] == [
        True,  # packed sequences are the same ones
        False,
    ]


def break_leaf(folder: Path) -> None:
    leaves = np.load(folder / "train.addresses.npy")
    leaves[3] = (leaves[3] + 1) % 4
    np.save(folder / "train.addresses.npy", leaves)


def break_record(folder: Path, **changes) -> None:
    record = json.loads((folder / "addresses.json").read_text())
    (folder / "addresses.json").write_text(json.dumps(record | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "addresses.json").unlink(), r"addresses\.json: missing.*kmem data cluster --data"),
        (lambda folder: break_record(folder, tree="f" * 64), r"addresses\.json: .*\bf{12}\b"),
        (lambda folder: break_record(folder, data="f" * 64), r"addresses\.json: .*\bother data\b"),
        (lambda folder: break_record(folder, version=7), r"addresses\.json: .*kmem-addresses 1\b"),
        (lambda folder: (folder / "addresses.json").write_text("{"), r"addresses\.json: .*kmem-addresses 1\b"),
        (lambda folder: (folder / "train.addresses.npy").unlink(), r"train\.addresses\.npy: .*\b48 units"),
        (
            lambda folder: (folder / "train.addresses.npy").write_bytes(b"\x93NUMPY"),
            r"train\.addresses\.npy: .*\b48 units",
        ),
        (
            lambda folder: np.save(folder / "train.addresses.npy", np.zeros(3, np.int32)),
            r"train\.addresses\.npy: .*\b48 units",
        ),
        (
            lambda folder: np.save(folder / "train.addresses.npy", np.array([{}] * 3)),
            r"train\.addresses\.npy: .*\b48 units",
        ),
        (break_leaf, r"train\.addresses\.npy: .*\b48 units"),
    ],
)
def test_addresses_that_do_not_fit_are_an_error_with_a_remedy(addressed, damage, message):
    folder, tree = addressed()
    damage(folder)
    with pytest.raises(UserError, match=message) as error:
        SequenceReader(with_addresses(config_of(folder), tree), "train")
    assert f"--tree {tree}" in str(error.value)


def test_a_missing_tree_is_an_error(addressed, tmp_path):
    folder, _ = addressed()
    with pytest.raises(UserError, match=r"nothing/tree\.json: missing.*kmem data cluster"):
        SequenceReader(with_addresses(config_of(folder), tmp_path / "nothing"), "train")


def rows_of(batch):
    """Of every sequence, all that it holds."""
    fields = (*FIELDS, "addresses")
    return [tuple(tuple(getattr(batch, name)[row].tolist()) for name in fields) for row in range(len(batch.input_ids))]


@pytest.mark.parametrize("unit", ["document", "window:20"])
def test_sequences_of_subtrees_are_those_of_all_text_without_the_others(addressed, unit):
    folder, tree = addressed(unit)
    parts = [("0",), ("1.0",), ("1.1",)]
    leaves = [{0, 1}, {2}, {3}]
    for split, epochs in (("train", 3), ("validation", 1)):
        whole = SequenceReader(with_addresses(config_of(folder), tree, "leaf"), split)
        ordered = [rows_of(whole.read(range(n * len(whole), (n + 1) * len(whole)))) for n in range(epochs)]
        readers = [SequenceReader(with_addresses(config_of(folder), tree, "leaf", part), split) for part in parts]
        assert sum(map(len, readers)) == len(whole)
        assert sum(reader.padding for reader in readers) == whole.padding
        for reader, wanted in zip(readers, leaves, strict=True):
            expected = [row for epoch in ordered for row in epoch if row[-1][0] in wanted]
            assert rows_of(reader.read(range(epochs * len(reader)))) == expected


def test_sources_keep_their_shares_of_a_subtree(addressed):
    """A source without text there is left out."""
    (one, tree), (other, _) = addressed(), addressed(texts=make_texts(60, seed=2), name="other")
    (third, _) = addressed(texts=make_texts(40, seed=3), name="third")
    record = json.loads((tree / "tree.json").read_text())
    manifest = read_manifest(third)
    counts = {split: len(units_of(third, split, "document")) for split in ("train", "validation")}
    write_addresses(third, manifest, record, {split: np.full(count, 3, np.int32) for split, count in counts.items()})
    config = DataConfig(
        sources=[{"path": str(one), "weight": 1}, {"path": str(other), "weight": 3}, {"path": str(third)}],
        sequence_length=32,
        seed=5,
    )
    alone = [config_of(folder) for folder in (one, other)]
    within, *parts = (with_addresses(part, tree, "leaf", ("0",)) for part in (config, *alone))
    reader = SequenceReader(within, "train")
    counts = [len(SequenceReader(part, "train")) for part in parts]
    totals = [len(SequenceReader(with_addresses(part, tree, "leaf"), "train")) for part in alone]
    assert len(reader) == sum(counts)
    assert len(SequenceReader(within, "validation")) > 0
    own = [set(rows_of(SequenceReader(part, "train").read(range(400)))) for part in parts]
    drawn = [sum(row in rows for row in rows_of(reader.read(range(400)))) for rows in own]
    assert sum(drawn) == 400
    expected = [weight * count / total for weight, count, total in zip((1, 3), counts, totals, strict=True)]
    assert drawn[0] / 400 == pytest.approx(expected[0] / sum(expected), abs=0.01)


def test_subtrees_that_are_not_there_or_empty_are_refused(addressed):
    folder, tree = addressed()
    for path, reason in [("2", r"\b0 to 1\b.*\b2$"), ("0.3", r"\b0 to 1\b.*\b3$"), ("0.0.0", r"\b1 to 2 parts")]:
        with pytest.raises(UserError, match=rf"data\.addresses\.subtrees: cluster {path}: .*{reason}"):
            SequenceReader(with_addresses(config_of(folder), tree, "leaf", (path,)), "train")
    record, manifest = json.loads((tree / "tree.json").read_text()), read_manifest(folder)
    units = {split: len(units_of(folder, split, "document")) for split in ("train", "validation")}
    write_addresses(
        folder, manifest, record, {split: np.arange(count, dtype=np.int32) % 2 for split, count in units.items()}
    )
    for chosen in (("1",), ("0", "1.0")):
        with pytest.raises(UserError, match=rf"data\.addresses\.subtrees: .*training text.*\bcluster {chosen[-1]};"):
            open_data(with_addresses(config_of(folder), tree, "leaf", chosen), BYTES_AND_EOS)
    whole, part = (
        open_data(with_addresses(config_of(folder), tree, "leaf", chosen), BYTES_AND_EOS) for chosen in ((), ("0",))
    )
    assert part.fingerprint == whole.fingerprint
    assert (whole.selection, part.selection) == ("", "0")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"subtrees": ["0"]}, r"subtrees=\['0'\].*batching=leaf\b"),
        ({"subtrees": ["0", "0"], "batching": "leaf"}, r"subtrees\n.* 0 and 0 .*\b0\b"),
        ({"subtrees": ["1.2.3", "2", "1"], "batching": "leaf"}, r"subtrees\n.* 1 and 1\.2\.3 .*\b1\.2\.3,"),
        ({"subtrees": [3.7], "batching": "leaf"}, r"subtrees\n.* 3\.7 .*\b3\.1 .*\b3\.10\b"),
        ({"subtrees": ["a"], "batching": "leaf"}, r"subtrees\n.* 'a': "),
        ({"subtrees": [], "batching": "leaf"}, r"subtrees\n.*\b1 item"),
    ],
)
def test_bad_subtrees_are_one_error(section, message):
    with pytest.raises(ValueError, match=message):
        AddressesConfig.model_validate({"tree": "none", **section})


def test_subtrees_are_in_the_order_of_the_tree():
    chosen = AddressesConfig(tree="none", batching="leaf", subtrees=["10", 2, "3.10", "3.7"])
    assert chosen.subtrees == ("2", "3.7", "3.10", "10")
