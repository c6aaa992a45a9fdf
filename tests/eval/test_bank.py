"""`kmem eval` of a memory bank: the addresses of the data or of the prompts, and the controls."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from kmem.checkpoint.bank.options import BankOptions
from kmem.checkpoint.controls import Choices
from kmem.cli import main
from kmem.data.batch import IGNORED_LABEL
from kmem.data.indexed import IndexedTokens
from kmem.data.prepare import Preparation, prepare
from kmem.data.reader import open_data
from kmem.data.tokenizer import load_tokenizer
from kmem.eval import memory_kinds
from kmem.eval.checkpoint import EvaluatedModel
from kmem.model.bank_fetched import without_blocks
from kmem.model.bank_router import descend_elsewhere
from kmem.model.bank_tree import ClusterTree, path_of
from kmem.model.decoder import Decoder
from tests.clustering.cluster_case import give_addresses
from tests.hf.banks import BANKS, bank, make_tree, random_bank, router, tree, write_bank_run
from tests.hf.models import TEXT, model, tokenizer, write_run
from tests.model.bank_parameters import FetchedBlocks
from tests.model.dense_mask import document_mask
from tests.small_corpora import with_addresses, write_jsonl
from tests.train.test_trainer import metrics
from tests.train.trainer_case import trainer_case

TEXTS = [f"{text} {number}" for number, text in enumerate(TEXT)]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """(a prepared folder without addresses, one with them)."""
    folders = []
    for name in ("bare", "addressed"):
        folder = tmp_path_factory.mktemp(name)
        options = {"tokenizer": tokenizer(), "validation_share": 0.5}
        prepare(Preparation([write_jsonl(folder / "texts.jsonl", TEXTS)], folder / "data", **options))
        folders.append(folder / "data")
    give_addresses(folders[1], tree())
    return folders


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    decoder = random_bank(BANKS["ffn"])
    return decoder, write_bank_run(tmp_path_factory.mktemp("bank") / "run", BANKS["ffn"], decoder)


def evaluate(capsys, reader, folder, *options):
    command = ["eval", "--checkpoint", str(reader.folder), "--data", str(folder), "--json", *options]
    assert main(command) == 0
    printed = json.loads(capsys.readouterr().out)
    return printed, printed["held_out"][str(folder)]["loss"]


def elsewhere(ids, leaf, *blocked):
    """The leaf of a document whose own cluster of level 1 is blocked."""
    return int(router().leaves([ids], [(leaf // 3,), *blocked]))


def around(ids, leaf, *blocked):
    """The leaf of a document where clusters are blocked; its own, if that is open."""
    open_to_it = all(path_of(leaf, 2, router().tree.children)[: len(path)] != path for path in blocked)
    return leaf if open_to_it else int(router().leaves([ids], blocked))


@torch.no_grad()
def expected_loss(decoder, reader, folder, change, generic=False, levels=None):
    """Of all held-out sequences at once, each token with the blocks of its own document, whose token ids and leaf
    `change` makes another leaf; None: without blocks."""
    source = reader.config.data.sources[0].model_copy(update={"path": str(folder)})
    config = reader.config.data.model_copy(update={"sources": (source,)})
    data = open_data(with_addresses(config, tree()), reader.config.model.vocab_size).validation
    batch = data.read(range(len(data)))
    blocks = without_blocks(decoder.layout)
    if change is not None:
        indexed, stored = IndexedTokens(folder / "validation"), np.load(folder / "validation.addresses.npy").tolist()
        spans = zip(indexed.starts, indexed.lengths, stored, strict=True)
        leaves = torch.tensor([change(indexed.take(np.arange(at, at + length)), leaf) for at, length, leaf in spans])
        of_tokens = leaves.repeat_interleave(torch.from_numpy(indexed.lengths))
        padding = batch.input_ids.numel() - len(of_tokens)
        of_tokens = torch.cat([of_tokens, of_tokens[-1:].expand(max(padding, 0))])[: batch.input_ids.numel()]
        ids = decoder.layout.row_ids(of_tokens.view_as(batch.input_ids), generic, levels)
        sources = {level: rows.__getitem__ for level, rows in decoder.rows.items()}
        blocks = FetchedBlocks.read(decoder.layout, ids, sources).inputs(batch.input_ids.shape[1])
    mask = document_mask(batch.document_ids)
    hidden = Decoder.forward(decoder, batch.input_ids, batch.position_ids, mask, memories={"bank": blocks})
    count = int((batch.labels != IGNORED_LABEL).sum())
    return float(decoder.loss(hidden, batch.labels)) / count


def test_the_loss_of_each_control(prepared, run, capsys):
    (bare, folder), (decoder, reader) = prepared, run
    ways = {
        ("fetched",): (lambda ids, leaf: leaf,),
        ("blocked",): (elsewhere,),
        ("generic",): (lambda ids, leaf: leaf, True),
        ("none",): (None,),
        ("fetched", "--bank-levels", "2"): (lambda ids, leaf: leaf, False, [2]),
        ("fetched", "--blocked", "1,2.0"): (lambda ids, leaf: around(ids, leaf, (1,), (2, 0)),),
        ("blocked", "--blocked", "1"): (lambda ids, leaf: elsewhere(ids, leaf, (1,)),),
    }
    losses = {}
    for options, arguments in ways.items():
        control, *others = options
        words = ("--control", f"bank={control}", *others, "--batch", "3")
        printed, losses[options] = evaluate(capsys, reader, folder, *words)
        assert printed["memories"] == {"bank": control}
        assert printed.get("blocked") == (options[2].split(",") if "--blocked" in options else None)
        assert losses[options] == pytest.approx(expected_loss(decoder, reader, folder, *arguments), abs=1e-5)
    assert len({round(loss, 4) for loss in losses.values()}) == len(losses)
    assert evaluate(capsys, reader, folder, "--batch", "3")[1] == losses[("fetched",)]
    # What needs no addresses is told without them.
    assert evaluate(capsys, reader, bare, "--control", "bank=none", "--batch", "3")[1] == losses[("none",)]
    assert evaluate(capsys, reader, bare, "--control", "bank=generic", "--batch", "3")[1] == losses[("generic",)]


@pytest.mark.parametrize("batching", ["packed", "leaf"])
def test_only_units_that_are_read_and_may_not_stay_are_embedded(prepared, run, batching, monkeypatch):
    """Whatever the sequences: those of one leaf stay as they are, and their documents go their own ways."""
    (_, folder), (_, reader) = prepared, run
    source = reader.config.data.sources[0].model_copy(update={"path": str(folder)})
    config = reader.config.data.model_copy(update={"sources": (source,)})
    held_out = open_data(with_addresses(config, tree(), batching), reader.config.model.vocab_size).validation
    embedded = []
    real = memory_kinds.leaves_around
    monkeypatch.setattr(
        memory_kinds, "leaves_around", lambda *some: (embedded.append(some[2].tolist()), real(*some))[1]
    )
    samples = held_out.spread(3)
    read, stored = held_out.units(samples), held_out.leaves
    assert EvaluatedModel(reader, Choices()).bank.around(held_out, folder, samples) is held_out
    assert EvaluatedModel(reader, Choices({"bank": "generic"})).bank.around(held_out, folder, samples) is held_out
    assert not embedded
    indexed = IndexedTokens(folder / "validation")
    texts = [indexed.take(np.arange(at, at + n)) for at, n in zip(indexed.starts, indexed.lengths, strict=True)]
    for choice, change in (
        (
            Choices(bank=BankOptions(blocked=((0,), (2, 1)))),
            lambda place: around(texts[place], int(stored[place]), (0,), (2, 1)),
        ),
        (Choices({"bank": "blocked"}), lambda place: elsewhere(texts[place], int(stored[place]))),
    ):
        moved = EvaluatedModel(reader, choice).bank.around(held_out, folder, samples)
        expected = [change(place) for place in read]
        assert moved.leaves[read].tolist() == expected
        changed = [int(place) for place, leaf in zip(read, expected, strict=True) if stored[place] != leaf]
        assert embedded.pop() == changed
        assert 0 < len(changed) < len(stored)
        assert torch.equal(moved.read(samples).input_ids, held_out.read(samples).input_ids)


@torch.no_grad()
def test_generic_blocks_are_taken_whatever_addresses_the_sequences_have(prepared, run):
    """Sequences of one leaf each always have some."""
    (_, folder), (decoder, reader) = prepared, run
    source = reader.config.data.sources[0].model_copy(update={"path": str(folder)})
    config = reader.config.data.model_copy(update={"sources": (source,)})
    batch = open_data(with_addresses(config, tree(), "leaf"), reader.config.model.vocab_size).validation.read(range(4))
    like = decoder.projection_weight
    generic, fetched = (
        EvaluatedModel(reader, Choices({"bank": way})).bank.of_batch(batch, like) for way in ("generic", "fetched")
    )
    ids = decoder.layout.row_ids(torch.zeros(4, dtype=torch.long), True)
    for layer, blocks in generic.items():
        for level, found in blocks.blocks.items():
            wanted = decoder.layout.by_layer(decoder.rows[level][ids[level][:1].flatten()], level)[layer]
            assert torch.equal(found, wanted)
            assert not torch.equal(found, fetched[layer].blocks[level])


def test_blocked_contexts_take_the_next_nearest_clusters():
    own, generator = ClusterTree.load(tree()), torch.Generator().manual_seed(5)
    embeddings = torch.randn(64, own.dim, generator=generator)
    first, second = own.descend(embeddings), descend_elsewhere(own, embeddings)
    assert not bool((own.level_ids(first, 1) == own.level_ids(second, 1)).any())
    for row, before, after in zip(embeddings, first.tolist(), second.tolist(), strict=True):
        assert int(own.descend(row[None], blocked=[path_of(before // 3, 1, own.children)])) == after
    # Of data, the stored leaf says which cluster is its own, wherever its embedding would descend to.
    stored = (first + 3) % 9
    found = descend_elsewhere(own, embeddings, (), stored)
    assert not bool((own.level_ids(found, 1) == own.level_ids(stored, 1)).any())
    allowed = own.level_ids(first, 1) != own.level_ids(stored, 1)
    assert torch.equal(found[allowed], first[allowed])
    barred = torch.tensor([3, 4, 6])
    assert not bool(torch.isin(descend_elsewhere(own, embeddings, [(1, 0), (1, 1), (2, 0)]), barred).any())


def test_a_detour_begins_at_the_first_blocked_cluster():
    own, every = ClusterTree.load(tree()), torch.arange(9).view(3, 3)
    found = own.detour(every, [(1,), (2, 0)])
    assert torch.equal(found[0], every[0])
    assert torch.equal(found[1], own.descend(own.centroids[-1][3:6], [(1,), (2, 0)]))
    assert found[2].tolist()[1:] == [7, 8]
    apart = (own.centroids[-1][7:] - own.centroids[-1][6]).norm(dim=1)
    assert int(found[2, 0]) == 7 + int(apart.argmin())  # the next nearest below the same cluster
    assert torch.equal(own.detour(every, [(2, 0), (2, 1), (2, 2)]), own.detour(every, [(2,)]))
    assert own.detour(every, []) is every
    assert own.detour(torch.tensor([-1, 4]), [(1, 1)])[0] == -1


def test_questions_fetch_for_their_prompts(run, tmp_path, capsys):
    decoder, reader = run
    path = tmp_path / "some.questions"
    asked = [("the model", " reads"), ("a reader of the text", " trains"), ("another", " model")]
    path.write_text("".join(json.dumps({"prompt": prompt, "answer": said}) + "\n" for prompt, said in asked))
    text = router()
    encode = load_tokenizer(reader.tokenizer_path).encode
    for control, options in {
        "fetched": (text.leaves, False),
        "fetched --blocked 1,2": (lambda contexts: text.leaves(contexts, [(1,), (2,)]), False),
        "blocked": (lambda contexts: descend_elsewhere(text.tree, text.embed(contexts)), False),
        "blocked --blocked 1.1": (lambda contexts: descend_elsewhere(text.tree, text.embed(contexts), [(1, 1)]), False),
        "generic": (text.leaves, True),
        "none": (None, False),
    }.items():
        route, generic = options
        bits = []
        for prompt, said in asked:
            ids = torch.tensor([encode(prompt + said)])
            first = len(encode(prompt))
            leaves = None if route is None else route([encode(prompt)])
            logits = decoder.bank_logits(ids, leaves, generic)[0, first - 1 : -1].log_softmax(-1)
            bits.append(-float(logits.gather(1, ids[0, first:, None]).sum()) / 0.6931471805599453)
        command = ["eval", "--checkpoint", str(reader.folder), "--questions", str(path), "--json", "--control"]
        assert main([*command, *f"bank={control}".split()]) == 0
        printed = json.loads(capsys.readouterr().out)
        assert printed["memories"]["bank"] == control.split()[0]
        assert printed["questions"][-1]["bits"] == pytest.approx(sum(bits) / len(bits), abs=1e-4)
    assert (
        main(["eval", "--checkpoint", str(reader.folder), "--questions", str(path), "--control", "bank=blocked"]) == 0
    )
    assert "bank blocked" in " ".join(capsys.readouterr().out.split())


def test_bad_input(prepared, run, tmp_path, capsys):
    (bare, folder), (_, reader) = prepared, run

    def fails(*options, checkpoint=reader, data=folder):
        assert main(["eval", "--checkpoint", str(checkpoint.folder), "--data", str(data), *options]) == 2
        return " ".join(capsys.readouterr().err.split())

    assert "kmem data cluster --data" in fails(data=bare)
    assert re.search(r"error: --bank-levels 3: level 3: .*levels 1, 2$", fails("--bank-levels", "3"))
    assert re.search(r"--bank-levels one: .*\b1,2$", fails("--bank-levels", "one"))
    assert re.search(r"--blocked.*: cluster 7: .*\b0 to 2\b", fails("--blocked", "0,7"))
    assert re.search(r"--blocked.*: cluster 0\.1\.2: .*\b1 to 2 parts", fails("--blocked", "0.1.2"))
    assert "--blocked 0,,1: cluster '': " in fails("--blocked", "0,,1")
    assert re.search("--blocked.*: every cluster", fails("--blocked", "0,1,2.0,2.1,2.2"))
    assert re.search("--blocked.*: every cluster", fails("--control", "bank=blocked", "--blocked", "0,1"))
    assert "--blocked 0: --control bank=generic " in fails("--control", "bank=generic", "--blocked", "0")
    broken = shutil.copytree(tree(), tmp_path / "broken")
    (broken / "embedder" / "tfidf.safetensors").unlink()
    for options in (("--control", "bank=blocked"), ("--blocked", "0")):
        complaint = fails(*options, "--tree", str(broken))
        assert re.search(rf"{broken}/embedder/tfidf\.safetensors: missing.*\btree\b.*\bembedder\b", complaint)
    other, deep = make_tree(tmp_path / "other", seed=1), make_tree(tmp_path / "deep", 2, 3)
    assert re.search(f"{other}: .*{reader.folder} .*--tree", fails("--tree", str(other)))
    assert re.search(r"model\.bank\.children: 3\b.*\b2 .*--children 3", fails("--tree", str(deep)))
    plain = write_run(tmp_path / "plain", model({"kind": "gqa", "num_heads": 2}, None))
    assert re.search(r"--control bank=none: .*\(model\.bank\)", fails("--control", "bank=none", checkpoint=plain))
    assert re.search(r"--blocked .*--tree: .*\(model\.bank\)", fails("--blocked", "0", checkpoint=plain))
    without = write_bank_run(tmp_path / "run", bank(generic={"probability": 0}))
    complaint = fails("--control", "bank=generic", checkpoint=without)
    assert re.search(r"--control bank=generic: .*\bfetched, none, blocked$", complaint)


@pytest.mark.parametrize("batching", ["packed", "leaf"])
def test_eval_equals_the_evaluation_of_the_run(batching, ranks, run_config, corpus, tmp_path, capsys):
    """With the tree and the sequences of the run."""
    folder, own = tmp_path / "prepared", make_tree(tmp_path / "own", 2, 2, of_tokenizer=corpus / "tokenizer")
    shutil.copytree(corpus, folder)
    give_addresses(folder, own)
    data = {
        "sources": [{"path": str(folder)}],
        "sequence_length": 32,
        "addresses": {"tree": str(own), "batching": batching},
    }
    section = {"children": 2, "levels": [4, 2], "generic": {"probability": 0.3}}
    changes = {"model__bank": section, "data": data, "evaluation": {"sequences": None}}
    settings, _ = run_config(**changes, train__steps=4, bank__optimizer__lr_multiplier=20.0)
    assert ranks.run(2, trainer_case, settings)[0]["error"] is None
    run = Path(settings["folder"]) / settings["name"]
    losses = {}
    for control in ("fetched", "generic", "none", "blocked"):
        assert main(["eval", "--checkpoint", str(run), "--control", f"bank={control}", "--json"]) == 0
        losses[control] = json.loads(capsys.readouterr().out)["held_out"][str(folder)]["loss"]
    assert losses["fetched"] == pytest.approx(metrics(settings, "evaluation")[-1]["loss"], abs=1e-5)
    assert losses["fetched"] not in (losses["none"], losses["blocked"])
