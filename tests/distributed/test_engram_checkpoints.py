"""Tables in checkpoints: another mesh continues, other addresses are refused, and memory can be added."""

import re
from pathlib import Path

import pytest
import torch

from kmem.checkpoint.manifest import REASONS
from kmem.checkpoint.pieces import CheckpointError
from kmem.checkpoint.reader import CheckpointReader
from kmem.checkpoint.store import CheckpointStore, step_folder
from kmem.model.engram_reader import table_name
from tests.distributed.test_engram_meshes import engram_config
from tests.distributed.training_case import build, checkpoint_case, load_checkpoint

SAVE, LAST = 3, 6
CATCHUP = {"engram__optimizer__name": "adam_catchup"}
WIDE = (4, {"parallel__pipeline": 2, "parallel__expert": 2})
ONE = (1, {})
MESHES = {"one": ONE, "data-4": (4, {}), "four-stages": (4, {"parallel__pipeline": 4})}


def run(ranks, mesh, root, load=None, save=None, last=LAST, **changes):
    world, shape = mesh
    return ranks.run(world, checkpoint_case, engram_config(**shape, **changes), str(root), load, save, last)[0]


@pytest.fixture(scope="module")
def wide_run(ranks, tmp_path_factory):
    """A run on pp2 ep2 dp2 that saves after step 3 and goes on to step 6."""
    root = tmp_path_factory.mktemp("memory")
    return root, run(ranks, WIDE, root, save=SAVE, **CATCHUP)


def test_same_mesh_is_bit_identical(ranks, wide_run, tmp_path):
    root, uninterrupted = wide_run
    resumed = run(ranks, WIDE, root, load=SAVE, **CATCHUP)
    assert resumed["checksums"] == uninterrupted["checksums"]
    assert {
        f"{array}/{table_name(2)}" for array in ("weight", "first_moment", "second_moment", "last_step", "step")
    } <= (resumed["checksums"].keys())
    assert resumed["losses"] == {step: uninterrupted["losses"][step] for step in range(SAVE, LAST)}


@pytest.mark.parametrize("mesh", MESHES)
def test_other_mesh_continues(ranks, wide_run, mesh):
    """Also with rows kept elsewhere: the store is no part of what is saved."""
    root, uninterrupted = wide_run
    resumed = run(ranks, MESHES[mesh], root, load=SAVE, engram__store="mmap", engram__folder=str(root), **CATCHUP)
    assert resumed["checksums"] == uninterrupted["checksums"]
    expected = {step: uninterrupted["losses"][step] for step in range(SAVE, LAST)}
    assert resumed["losses"] == pytest.approx(expected, abs=1e-5)


def test_reader_sees_whole_tables(wide_run):
    root, _ = wide_run
    reader = CheckpointReader(step_folder(root, SAVE))
    assert reader.addressing["layers"] == [1, 2]
    whole = reader.read(table_name(1))
    assert whole.shape == (sum(reader.addressing["sizes"][0]), 8)
    assert torch.equal(reader.read_rows(table_name(1), 50, 90), whole[50:90])


REFUSED = [
    ({"model__engram__rows_per_head": 80}, rf"^model\.engram: .*\bsizes .*{REASONS['sizes']}"),
    ({"model__engram__seed": 1}, r"^model\.engram: .*\bmultipliers .*Correct model\.engram\b"),
    ({"model__engram__boundary": "none"}, r"^model\.engram: .*\bboundary .*\bnone .*\bdocument "),
    ({"model__engram__compression": False}, r"^model\.engram: .*\bcompression_digest .*\bNone "),
    ({"model__engram__pad_token_id": 7}, r"^model\.engram: .*\bpad_id .*\b3 .*\b0 "),
    ({"model__engram": None}, r"/step-\d+ .*\bmodel\.engram\b.*null"),
    ({"model__engram__conv_kernel": 0}, r"^model\.engram\.conv_kernel: 0 .*\b4 "),
    ({"engram__optimizer__name": "lazy_adam"}, r"^engram\.optimizer\.name: 'lazy_adam' .*'adam_catchup'"),
    ({"engram__dtype": "bf16"}, r"^engram\.dtype: 'bf16' .*'fp32'"),
]


@pytest.mark.full
def test_other_addresses_are_refused(ranks, wide_run):
    """On every rank with the same message, which names the field."""
    root, _ = wide_run
    world, shape = WIDE
    trees = [engram_config(**shape, **{**CATCHUP, **changes}) for changes, _ in REFUSED]
    for messages in ranks.run(world, refusals, trees, str(root)):
        for message, (_, expected) in zip(messages, REFUSED, strict=True):
            assert re.search(expected, message)


def refusals(trees, root):
    """What loading step SAVE says for each configuration."""
    return [_refusal(tree, Path(root)) for tree in trees]


def _refusal(tree, root):
    pipeline, store = build(tree), CheckpointStore(root)
    try:
        load_checkpoint(store, step_folder(root, SAVE), pipeline)
    except CheckpointError as error:
        return str(error)
    finally:
        pipeline.close()
    return "loaded"


def test_memory_added_to_a_checkpoint_is_a_no_op_at_first(ranks, tmp_path):
    """And learns from then on."""
    with_engram = {"model__engram__init_std": 0.0}
    plain = run(ranks, WIDE, tmp_path, save=SAVE, model__engram=None)
    for mesh in (WIDE, ONE):
        added = run(ranks, mesh, tmp_path, load=SAVE, **with_engram)
        tolerance = 0 if mesh == WIDE else 1e-6
        assert added["losses"][SAVE] == pytest.approx(plain["losses"][SAVE], abs=tolerance)
        assert added["losses"][SAVE + 1] != pytest.approx(plain["losses"][SAVE + 1], abs=1e-6)
    (message,) = ranks.run(1, refusals, [engram_config()], str(tmp_path))[0]
    assert message.startswith("model.engram.init_std: 0.3, ")
