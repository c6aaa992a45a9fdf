"""`kmem train` with a memory bank: addresses of prepared data, generic blocks, resuming, errors."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from kmem.checkpoint.bank.layout import bank_layout
from kmem.checkpoint.reader import CheckpointReader
from kmem.cli import main
from kmem.config import UserError, load_config, parse_config
from kmem.data.batch import SequenceBatch
from kmem.hf.loading import load
from kmem.model.bank_layout import GENERIC
from kmem.parallel.bank_kind import KIND as BANK_KIND
from tests.clustering.cluster_case import give_addresses, write_tree
from tests.distributed.bank_case import bank_config
from tests.train.trainer_case import trainer_case

BANK = {"children": 2, "levels": [4, 1], "generic": {"probability": 0.3}}


@pytest.fixture
def addressed(corpus, tmp_path):
    """(prepared folder with addresses, its tree of two levels of two children)."""
    folder, tree = tmp_path / "prepared", write_tree(tmp_path / "the-tree", 2, 2)
    shutil.copytree(corpus, folder)
    give_addresses(folder, tree)
    return folder, tree


@pytest.fixture
def bank_run(run_config, addressed):
    """bank_run(**dotted changes) -> (tree, path of its YAML file) of a run with a bank."""
    folder, tree = addressed

    def make(**changes):
        data = {"sources": [{"path": str(folder)}], "sequence_length": 32, "addresses": {"tree": str(tree)}}
        return run_config(**{"model__bank": BANK, "data": data, **changes})

    return make


@pytest.mark.parametrize("batching", ["packed", "leaf"])
def test_a_run_trains_evaluates_and_resumes(ranks, bank_run, addressed, tmp_path, capsys, batching):
    """An interrupted run ends where an uninterrupted one does, with the generic blocks drawn alike on another mesh."""
    changes = {"data__addresses__batching": batching, "parallel__pipeline": 2}
    whole, _ = bank_run(**changes, name="whole", train__steps=4)
    assert ranks.run(2, trainer_case, whole)[0]["error"] is None
    half, _ = bank_run(**changes, name="half", train__steps=2)
    assert ranks.run(2, trainer_case, half)[0]["error"] is None
    rest, _ = bank_run(**changes, name="half", train__steps=4)
    resumed = ranks.run(2, trainer_case, rest)[0]
    assert (resumed["error"], resumed["started_at"], resumed["steps"]) == (None, 2, 4)
    one, other = (CheckpointReader(tmp_path / "runs" / name) for name in ("whole", "half"))
    assert one.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(one.read(name), other.read(name)) for name in one.tensors)
    assert one.commit.manifests["bank"] == BANK_KIND.prepare(parse_config(whole), one.tokenizer_path)
    assert (one.run_folder / "tree" / "tree.json").is_file()
    records = [json.loads(line) for line in (one.run_folder / "metrics.jsonl").read_text().splitlines()]
    steps = [record["memories"]["bank"] for record in records if record["kind"] == "step"]
    assert [list(figures) for figures in steps] == [["1", "2"]] * 4
    assert all(0 < figures["2"]["touched_blocks"] <= 5 for figures in steps)
    assert main(["bank", "list", "--checkpoint", str(one.run_folder), "0", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [level["hits"] for level in listed["levels"]] == [figures["hits"] for figures in steps[-1].values()]
    tokens = {cluster["path"]: cluster["tokens"] for cluster in listed["clusters"]}
    assert 0 < tokens["0"] == sum(count for path, count in tokens.items() if path != "0")
    experts = [figures for record in records for figures in record.get("experts", {}).values()]
    assert experts
    assert all(figures["dropped"] == 0 for figures in experts), "padding is no choice that was lost"


@pytest.mark.parametrize("batching", ["packed", "leaf"])
def test_evaluations_have_controls(ranks, bank_run, tmp_path, capsys, batching):
    """The same figures on two stages as `kmem eval` has, and a loss of fetched blocks that is the same with and without
    controls."""
    changes = {"data__addresses__batching": batching, "train__steps": 3, "parallel__pipeline": 2}
    controls = {"sequences": None, "controls": ["bank=generic", "bank=none"]}
    for name, evaluation in (("plain", {"sequences": None}), ("with-controls", controls)):
        tree, _ = bank_run(name=name, evaluation=evaluation, **changes)
        answer = ranks.run(2, trainer_case, tree)[0]
        assert answer["error"] is None
    plain, found = (
        [line for line in map(json.loads, (tmp_path / "runs" / name / "metrics.jsonl").open()) if "perplexity" in line]
        for name in ("plain", "with-controls")
    )
    assert [line["loss"] for line in plain] == [line["loss"] for line in found]
    last = found[-1]
    assert last["controls"].keys() == {"bank=generic", "bank=none"}
    assert plain[-1]["controls"] == {}
    for control, figures in last["controls"].items():
        words = ["eval", "--checkpoint", str(tmp_path / "runs" / "with-controls"), "--control", control, "--json"]
        capsys.readouterr()
        assert main(words) == 0
        (stated,) = json.loads(capsys.readouterr().out)["held_out"].values()
        assert stated["loss"] == pytest.approx(figures["loss"], rel=1e-6)
        assert figures["loss"] != last["loss"]
        difference = figures["bits_per_byte"] - last["bits_per_byte"]
        assert f"{control}: {figures['bits_per_byte']:.4f} bits per byte ({difference:+.4f})" in answer["printed"]


def test_a_run_on_generic_blocks_alone_is_evaluated_with_them(ranks, bank_run, tmp_path, capsys):
    """While it trains, by `kmem eval` and in its export, where nothing else is said: no fetched block has learned."""
    changes = {"model__bank__generic__probability": 1.0, "train__steps": 3}
    tree, _ = bank_run(name="only", evaluation={"sequences": None, "controls": ["bank=none"]}, **changes)
    (answer,) = ranks.run(1, trainer_case, tree)
    assert answer["error"] is None
    run = tmp_path / "runs" / "only"
    last = [json.loads(line) for line in (run / "metrics.jsonl").open()][-1]

    def held_out(*words):
        capsys.readouterr()
        assert main(["eval", "--checkpoint", str(run), "--json", *words]) == 0
        stated = json.loads(capsys.readouterr().out)
        (figures,) = stated["held_out"].values()
        return stated["memories"]["bank"], figures["loss"]

    assert held_out() == ("generic", pytest.approx(last["loss"], rel=1e-6))
    assert held_out("--control", "bank=none")[1] == pytest.approx(last["controls"]["bank=none"]["loss"], rel=1e-6)
    assert held_out("--control", "bank=fetched")[1] == held_out("--control", "bank=none")[1] != last["loss"]
    model, _ = load(run)
    assert model.bank_control == "generic"
    model, _ = load(run, {"bank": "fetched"})
    assert model.bank_control == "fetched"


def test_controls_of_a_memory_that_the_model_does_not_have(bank_run):
    tree = bank_run(evaluation__controls=["bank=generic"], model__bank=None, data__addresses=None)[0]
    with pytest.raises(UserError, match=r"evaluation\.controls.*model\.bank"):
        parse_config(tree)


@pytest.mark.parametrize(
    ("control", "changes"),
    [("bank=generic", {"model__bank__generic__probability": 0.0}), ("bank=blocked", {}), ("bank=off", {})],
)
def test_controls_that_a_bank_does_not_have(ranks, bank_run, control, changes):
    error = ranks.run(1, trainer_case, bank_run(evaluation__controls=[control], **changes)[0])[0]["error"]
    assert "evaluation.controls" in error
    assert control in error


def test_a_bank_is_added_to_a_run(ranks, bank_run, tmp_path):
    """The sequences are the ones it was trained on, now with addresses; those of single leaves are others."""
    plain, _ = bank_run(name="plain", model__bank=None, data__addresses=None, train__steps=2)
    assert ranks.run(1, trainer_case, plain)[0]["error"] is None
    start = {"checkpoint__resume": str(tmp_path / "runs" / "plain"), "train__steps": 3}
    added, _ = bank_run(name="added", **start)
    result = ranks.run(1, trainer_case, added)[0]
    assert (result["error"], result["started_at"], result["steps"]) == (None, 2, 3)
    leaves, _ = bank_run(name="leaves", data__addresses__batching="leaf", **start)
    assert "data: fingerprint differs" in ranks.run(1, trainer_case, leaves)[0]["error"]


@pytest.mark.parametrize("store", ["host", "mmap"])
def test_a_run_may_begin_with_weights_of_another_type(ranks, bank_run, tmp_path, store):
    """They are rounded; a run that goes on, with its optimizer, keeps its type."""
    first, _ = bank_run(name="first", train__steps=2)
    assert ranks.run(1, trainer_case, first)[0]["error"] is None
    begin = {"checkpoint": {"start": str(tmp_path / "runs" / "first")}, "train__steps": 1}
    begin["train__optimizer__lr"] = 1e-12
    changes = {"bank": {"dtype": "bf16", "store": store, "optimizer": {"weight_decay": 0.0}}, **begin}
    rounded, _ = bank_run(name="rounded", parallel__pipeline=2, **changes)
    assert [answer["error"] for answer in ranks.run(4, trainer_case, rounded)] == [None] * 4
    one, other = (CheckpointReader(tmp_path / "runs" / name) for name in ("first", "rounded"))
    names = [name for name in one.tensors if ".bank." in name]
    assert names
    for name in names:
        assert other.read(name).dtype == torch.bfloat16
        torch.testing.assert_close(other.read(name), one.read(name).bfloat16(), rtol=0, atol=1e-9)
    resumed, _ = bank_run(name="going-on", **changes | {"checkpoint": {"resume": str(tmp_path / "runs" / "first")}})
    (answer,) = ranks.run(1, trainer_case, resumed)
    assert re.match(r"bank\.dtype: 'bf16' .*'fp32' .*checkpoint\.start\b", answer["error"])


def test_a_frozen_anchor_needs_a_trained_one(ranks, bank_run):
    lost, _ = bank_run(name="lost", model__bank={**BANK, "anchor": "frozen"})
    errors = {answer["error"] for answer in ranks.run(2, trainer_case, lost)}
    assert len(errors) == 1
    assert re.match(r"model\.bank\.anchor: frozen\b.*checkpoint\.start\b", errors.pop())


@pytest.mark.parametrize("anchor", ["frozen", pytest.param("train", marks=pytest.mark.full)])
def test_a_bank_is_added_to_an_imported_model(ranks, bank_run, tmp_path, anchor, capsys):
    """By its own run going on, and by a run that begins with its weights and includes its model."""
    plain, _ = bank_run(name="plain", model__moe=None, model__bank=None, data__addresses=None, train__steps=2)
    ranks.run(1, trainer_case, plain)
    exported, imported = str(tmp_path / "exported"), str(tmp_path / "runs" / "imported")
    assert main(["export", "--checkpoint", str(tmp_path / "runs" / "plain"), "--out", exported]) == 0
    assert main(["import", "--from", exported, "--out", imported]) == 0
    bank = {**BANK, "anchor": anchor}
    section = CheckpointReader(imported).config.model.model_dump(mode="json")
    added, _ = bank_run(name="imported", train__steps=2)
    added["model"] = {**section, "bank": bank}
    result = ranks.run(1, trainer_case, added)[0]
    assert (result["error"], result["started_at"], result["steps"]) == (None, 0, 2)
    (line,) = (line for line in result["printed"].splitlines() if line.startswith("step 2/"))
    records = [json.loads(text) for text in Path(imported, "metrics.jsonl").read_text().splitlines()]
    trained = records[-2]["memories"]["bank"]
    blocks = sum(level["touched_blocks"] for level in trained.values())
    assert (f"  blocks {blocks}  " in line, "  grad " in line) == (anchor == "frozen", anchor != "frozen")
    kept, after = CheckpointReader(tmp_path / "runs" / "plain"), CheckpointReader(imported)
    same = [torch.equal(kept.read(name), after.read(name)) for name in kept.tensors]
    assert all(same) if anchor == "frozen" else not all(same)
    assert any(after.read(name).any() for name in after.tensors if ".bank." in name)
    assert main(["import", "--from", exported, "--out", f"{imported}-again"]) == 0
    begun, path = bank_run(name="begun", checkpoint__start=f"{imported}-again", data__addresses__batching="leaf")
    begun |= {"include": f"{imported}-again/model.yaml", "model": {"bank": bank}}
    path.write_text(yaml.safe_dump(begun))
    result = ranks.run(1, trainer_case, load_config(path).model_dump(mode="json"))[0]
    assert (result["error"], result["started_at"], result["steps"]) == (None, 0, 6)
    begun = CheckpointReader(tmp_path / "runs" / "begun")
    same = [torch.equal(kept.read(name), begun.read(name)) for name in kept.tensors]
    assert all(same) if anchor == "frozen" else not all(same)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__bank": {**BANK, "levels": [4]}}, r"model\.bank\.levels: 1\b.*\b2 .*--levels 1"),
        ({"model__bank": {**BANK, "levels": [4, 1, 1]}}, r"model\.bank\.levels: 3\b.*\b2 .*--levels 3"),
        ({"model__bank": {**BANK, "children": 3}}, r"model\.bank\.children: 3\b.*\b2 .*--children 3"),
        ({"data__addresses__tree": "nowhere"}, r"nowhere/tree\.json: missing"),
        ({"data__addresses": None}, r"model\.bank .*data\.addresses\b"),
    ],
)
def test_bad_trees_are_one_error(bank_run, capsys, changes, message):
    _, path = bank_run(**changes)
    assert main(["train", "--config", str(path)]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("file", ["tree.safetensors", "embedder/none.json"])
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"other")], ids=["missing", "other"])
def test_a_tree_in_parts_is_refused_before_it_replaces_the_runs_copy(
    ranks, bank_run, addressed, tmp_path, capsys, file, damage
):
    """Training needs its leaves alone; what is exported looks contexts up in the copy."""
    _, tree = addressed
    first, _ = bank_run(train__steps=1)
    assert ranks.run(1, trainer_case, first)[0]["error"] is None
    copy = Path(first["folder"]) / first["name"] / "tree"
    kept = copy / file
    before = kept.stat().st_mtime_ns, kept.read_bytes()
    more, path = bank_run(train__steps=2)
    damage(tree / file)
    assert main(["train", "--config", str(path)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"data.addresses.tree: {tree / file}: missing" in said
    assert (kept.stat().st_mtime_ns, kept.read_bytes()) == before
    shutil.rmtree(tree)
    shutil.copytree(copy, tree)
    assert ranks.run(1, trainer_case, more)[0]["steps"] == 2
    assert (kept.stat().st_mtime_ns, kept.read_bytes()) == before  # not copied again
    damage(kept)
    last, _ = bank_run(train__steps=3)
    assert ranks.run(1, trainer_case, last)[0]["steps"] == 3
    assert kept.read_bytes() == before[1]  # mended


def test_documents_without_addresses_are_one_error(bank_run, addressed, capsys):
    folder, _ = addressed
    (folder / "addresses.json").unlink()
    _, path = bank_run()
    assert main(["train", "--config", str(path)]) == 2
    assert re.search(rf"{folder}/addresses\.json: missing.*kmem data cluster", capsys.readouterr().err)


@pytest.mark.full
def test_another_tree_than_the_checkpoints_is_refused(ranks, bank_run, addressed, tmp_path):
    first, _ = bank_run(train__steps=2)
    assert ranks.run(1, trainer_case, first)[0]["error"] is None
    other = write_tree(tmp_path / "another", 2, 2, "window:16")
    give_addresses(addressed[0], other)
    second, _ = bank_run(data__addresses__tree=str(other))
    error = ranks.run(1, trainer_case, second)[0]["error"]
    assert re.match(r"data\.addresses\.tree: .*\bunit .*\bwindow:16 .*\bdocument ", error)


def draws(samples, step=0, **changes):
    config = parse_config(bank_config(**changes))
    blank = torch.zeros(len(samples), 4, dtype=torch.int64)
    batch = SequenceBatch(blank, blank, blank, blank, addresses=blank + 5)
    return BANK_KIND.training_batch(config, batch, samples, step).addresses


def test_sequences_draw_generic_blocks_by_their_number():
    found = draws(range(2000))
    assert set(found.flatten().tolist()) == {5, GENERIC}
    assert (found == found[:, :1]).all()
    assert abs((found[:, 0] == GENERIC).float().mean() - 0.2) < 0.03
    assert torch.equal(draws(range(700, 720), step=3), found[700:720])  # whatever the step, rank or micro-batch
    assert not torch.equal(draws(range(2000), data__seed=1), found)
    assert (draws(range(50), model__bank__generic={"probability": 1.0}) == GENERIC).all()
    assert (draws(range(50), model__bank__generic={}) == 5).all()


def test_steps_draw_generic_blocks_for_all_sequences():
    per_batch = {"model__bank__generic": {"probability": 0.2, "per": "batch"}}
    by_step = [draws([7, 900], step, **per_batch) for step in range(500)]
    assert all((found == found[0, 0]).all() for found in by_step)
    assert abs(sum(int(found[0, 0] == GENERIC) for found in by_step) / 500 - 0.2) < 0.06
    assert torch.equal(by_step[3], draws([1, 2], 3, **per_batch))


def test_a_missing_tree_is_the_users_error(tmp_path):
    with pytest.raises(UserError, match=rf"{tmp_path}/tree\.json: missing"):
        BANK_KIND.prepare(parse_config(bank_config(data__addresses__tree=str(Path(tmp_path)))), tmp_path)


def test_blocks_keep_the_seed_that_they_were_drawn_with(ranks, bank_run, tmp_path):
    """Whatever `train.init_seed` a later run has: what is erased is what never was trained."""
    first, _ = bank_run(name="first", train__steps=1, train__init_seed=3)
    assert ranks.run(1, trainer_case, first)[0]["error"] is None
    runs = str(tmp_path / "runs")
    for name, begin in (("resumed", "checkpoint__resume"), ("started", "checkpoint__start")):
        second, _ = bank_run(name=name, train__steps=2, train__init_seed=4, **{begin: f"{runs}/first"})
        assert ranks.run(1, trainer_case, second)[0]["error"] is None
        reader = CheckpointReader(f"{runs}/{name}")
        assert reader.commit.progress.memories["bank"]["seed"] == 3
        erased = f"{runs}/{name}-erased"
        assert main(["bank", "erase", "0", "1", "--subtree", "--checkpoint", f"{runs}/{name}", "--out", erased]) == 0
        layout = bank_layout(reader)
        found, fresh = CheckpointReader(erased), layout.by_layer(layout.initial_rows(3, 1, 0, 2), 1)
        for layer, rows in fresh.items():
            assert torch.equal(found.read(f"layers.{layer}.bank.level1")[:2], rows)
