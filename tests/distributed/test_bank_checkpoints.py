"""A memory bank in checkpoints: layers' blocks as whole tensors, on whichever mesh, and banks added to a model."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kmem.checkpoint.commit import Commit
from kmem.checkpoint.manifest import REASONS
from kmem.checkpoint.pieces import CheckpointError
from kmem.checkpoint.reader import CheckpointReader
from kmem.checkpoint.store import CheckpointStore, step_folder
from kmem.config import parse_config
from kmem.model.bank_layout import BankLayout, layer_bank_name
from tests.distributed.bank_case import EXPERTS, bank_config
from tests.distributed.training_case import build, checkpoint_case, load_checkpoint

SAVE, LAST = 2, 4
CATCHUP = {"bank__optimizer__name": "adam_catchup"}
WIDE = (4, {"parallel__pipeline": 2, "parallel__expert": 2})
ONE = (1, {})
MESHES = {"one": ONE, "data-4": (4, {}), "four-stages": (4, {"parallel__pipeline": 4})}
TREE = {"fingerprint": "a", "children": 3, "levels": 4, "unit": "document", "embedder": {"name": "tfidf"}}


def run(ranks, mesh, root, load=None, save=None, last=LAST, **changes):
    world, shape = mesh
    config = bank_config(**shape, **changes)
    return ranks.run(world, checkpoint_case, config, str(root), load, save, last, False, False, TREE)[0]


@pytest.fixture(scope="module")
def wide_run(ranks, tmp_path_factory):
    """A run on pp2 ep2 dp2 that saves after step 2 and goes on to step 4."""
    root = tmp_path_factory.mktemp("bank")
    return root, run(ranks, WIDE, root, save=SAVE, **CATCHUP)


def test_same_mesh_is_bit_identical(ranks, wide_run):
    root, uninterrupted = wide_run
    resumed = run(ranks, WIDE, root, load=SAVE, **CATCHUP)
    assert resumed["checksums"] == uninterrupted["checksums"]
    arrays = ("weight", "first_moment", "second_moment", "last_step", "step")
    expected = {f"{array}/{layer_bank_name(2, 4)}" for array in arrays} | {"hits/bank", "last_use/bank.level4"}
    assert expected <= resumed["checksums"].keys()
    assert resumed["losses"] == {step: uninterrupted["losses"][step] for step in range(SAVE, LAST)}


@pytest.mark.parametrize("mesh", MESHES)
def test_other_mesh_continues(ranks, wide_run, mesh):
    """Also with rows kept elsewhere: the store is no part of what is saved."""
    root, uninterrupted = wide_run
    store = {"bank__store": "mmap", "bank__folder": str(root)}
    resumed = run(ranks, MESHES[mesh], root, load=SAVE, **store, **CATCHUP)
    assert resumed["checksums"] == uninterrupted["checksums"]
    expected = {step: uninterrupted["losses"][step] for step in range(SAVE, LAST)}
    assert resumed["losses"] == pytest.approx(expected, abs=1e-5)


def test_reader_sees_whole_blocks(wide_run):
    root, _ = wide_run
    reader = CheckpointReader(step_folder(root, SAVE))
    layout = BankLayout.of(parse_config(bank_config()).model.shape)
    name = layer_bank_name(3, 2)
    whole = reader.read(name)
    assert whole.shape == (layout.rows(2), layout.block_values(2))
    assert torch.equal(reader.read_rows(name, 3, 7), whole[3:7])
    assert reader.commit.manifests == {"bank": TREE}


def test_blocks_of_a_checkpoint_without_counts_have_counted_all_steps(ranks, tmp_path):
    """Those that were trained: that is what their moments were corrected by."""
    run(ranks, ONE, tmp_path, save=SAVE, last=SAVE)
    folder = step_folder(tmp_path, SAVE)
    commit = Commit.read(folder)
    without = {key: tensor for key, tensor in commit.tensors.items() if not key.startswith("updates/")}
    assert len(without) < len(commit.tensors)
    replace(commit, tensors=without).write(folder)
    (found,) = ranks.run(1, counts_case, bank_config(), str(tmp_path))
    for updates, trained in found:
        assert torch.equal(updates, SAVE * trained.int())
    assert any(trained.any() and not trained.all() for _, trained in found)


def counts_case(tree, root):
    """Updates of the blocks of each level, and which have moments, after loading step SAVE."""
    pipeline, store = build(tree, TREE), CheckpointStore(Path(root))
    load_checkpoint(store, step_folder(Path(root), SAVE), pipeline)
    tables = [table.store for table in pipeline.stage_tables.tables.values()]
    found = [(rows["updates"].clone(), (rows["first_moment"] != 0).any(dim=1, keepdim=True)) for rows in tables]
    pipeline.close()
    return found


OTHER_TREE = {**TREE, "fingerprint": "b", "embedder": {"name": "minilm"}}
REFUSED = [
    ({"model__bank__levels": [5, 2, 0, 2]}, TREE, r"^model\.bank\.levels: .*5, 2, 0, 2"),
    ({"model__bank__kind": "kv"}, TREE, r"^model\.bank\.kind: 'kv' .*'ffn'"),
    ({"model__bank__generic": {}}, TREE, r"^model\.bank\.generic\.probability: 0 "),
    ({"model__bank": None}, TREE, r"/step-\d+ .*\bmodel\.bank\b.*null"),
    ({"bank__optimizer__name": "lazy_adam"}, TREE, r"^bank\.optimizer\.name: 'lazy_adam' .*'adam_catchup'"),
    ({"bank__dtype": "bf16"}, TREE, r"^bank\.dtype: 'bf16' .*'fp32'"),
    ({}, OTHER_TREE, rf"^data\.addresses\.tree: .*\bembedder .*'minilm'.*{REASONS['embedder']}"),
]


def test_other_banks_are_refused(ranks, wide_run):
    """On every rank with the same message, which names the field."""
    root, _ = wide_run
    world, shape = (2, {"parallel__pipeline": 2})
    trees = [(bank_config(**shape, **{**CATCHUP, **changes}), tree) for changes, tree, _ in REFUSED]
    for messages in ranks.run(world, refusals, trees, str(root)):
        for message, (_, _, expected) in zip(messages, REFUSED, strict=True):
            assert re.search(expected, message)


def refusals(cases, root):
    """What loading step SAVE says for each configuration and cluster tree."""
    return [_refusal(config, tree, Path(root)) for config, tree in cases]


def _refusal(config, tree, root):
    pipeline, store = build(config, tree), CheckpointStore(root)
    try:
        load_checkpoint(store, step_folder(root, SAVE), pipeline)
    except CheckpointError as error:
        return str(error)
    finally:
        pipeline.close()
    return "loaded"


def test_a_bank_added_to_a_checkpoint_is_a_no_op_at_first(ranks, tmp_path):
    """And learns from then on; the optimizer of the rest goes on."""
    plain = run(ranks, WIDE, tmp_path, save=SAVE, model__bank=None)
    for mesh in (WIDE, ONE):
        added = run(ranks, mesh, tmp_path, load=SAVE)
        tolerance = 0 if mesh == WIDE else 1e-6
        assert added["losses"][SAVE] == pytest.approx(plain["losses"][SAVE], abs=tolerance)
        assert added["losses"][SAVE + 1] != pytest.approx(plain["losses"][SAVE + 1], abs=1e-6)
        moments = {name for name in plain["checksums"] if name.startswith("exp_avg")}
        assert moments
        assert all(added["checksums"][name] == plain["checksums"][name] for name in moments)
        fresh = [name for name in added["checksums"] if name.startswith("weight/layers.0.bank.")]
        assert len(fresh) == 3


ENGRAM = {"layers": [1], "heads": 2, "rows_per_head": 40, "row_dim": 8, "compression": False, "init_std": 0.3}
FROZEN = {"model__bank__anchor": "frozen"}
BALANCED = {**EXPERTS, "score_function": "sigmoid", "selection_bias": True, "bias_update_rate": 0.01}


@pytest.mark.parametrize(
    "changes", [{}, pytest.param({"train__precision": "bf16"}, marks=pytest.mark.full)], ids=["fp32", "bf16"]
)
def test_a_frozen_anchor_keeps_its_bits(ranks, tmp_path, changes):
    """Weights, in bf16 their masters, selection biases and rows of n-grams; nothing else is saved of it."""
    changes = {**changes, "model__moe": BALANCED, "model__engram": ENGRAM, "engram__prefetch_depth": 2}
    run(ranks, ONE, tmp_path, save=1, last=1, **changes, model__bank=None)
    trained = run(ranks, WIDE, tmp_path, load=1, save=3, last=3, **changes, **FROZEN)
    before, after = (CheckpointReader(step_folder(tmp_path, step)) for step in (1, 3))
    assert {"layers.1.engram.table", "layers.1.feed_forward.router.selection_bias"} <= before.tensors.keys()
    for name in before.tensors:
        assert torch.equal(before.read(name).view(torch.int32), after.read(name).view(torch.int32)), name
    assert after.read(layer_bank_name(0, 1)).any()
    anchors = [name for name in after.commit.tensors if ".bank." not in name and "/bank" not in name]
    kept = [name for name in anchors if not name.startswith("weight/")]
    assert kept == []
    # It goes on, elsewhere and with the anchor trained, too.
    again = run(ranks, ONE, tmp_path, load=3, last=4, **changes, **FROZEN)
    assert again["checksums"].keys() == trained["checksums"].keys()
    together = run(ranks, ONE, tmp_path, load=3, last=4, **changes)
    assert together["losses"][3] == pytest.approx(again["losses"][3], abs=1e-6)
