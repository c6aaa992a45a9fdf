"""A checkpoint saved on one mesh continues on another: equal checksums of every tensor, equal next losses."""

import pytest

from kmem.checkpoint.reader import CheckpointReader
from kmem.checkpoint.store import step_folder
from tests.distributed.training_case import checkpoint_case, small_config

SAVE, LAST = 3, 6
WIDE = (4, {"parallel__pipeline": 2, "parallel__expert": 2})
ONE = (1, {})
MESHES = {
    "one": ONE,
    "zero-0": (4, {"parallel__pipeline": 2, "parallel__expert": 2, "parallel__zero_stage": 0}),
    "data-4": (4, {"parallel__expert": 2}),
    "four-stages": (4, {"parallel__pipeline": 4}),
    "experts-4": (4, {"parallel__expert": 4}),
}


def run(ranks, mesh, root, **arguments):
    world, changes = mesh
    changes = changes | arguments.pop("changes", {})
    return ranks.run(world, checkpoint_case, small_config(**changes), str(root), *arguments.values())[0]


@pytest.fixture(scope="module")
def wide_run(ranks, tmp_path_factory):
    """A run on pp2 ep2 dp2 that saves after step 3 and goes on to step 6."""
    root = tmp_path_factory.mktemp("wide")
    return root, run(ranks, WIDE, root, load=None, save=SAVE, last=LAST)


def test_same_mesh_is_bit_identical(ranks, wide_run):
    root, uninterrupted = wide_run
    resumed = run(ranks, WIDE, root, load=SAVE, save=None, last=LAST)
    assert resumed["checksums"] == uninterrupted["checksums"]
    assert resumed["losses"] == {step: uninterrupted["losses"][step] for step in range(SAVE, LAST)}


@pytest.mark.parametrize("mesh", MESHES)
def test_other_mesh_continues(ranks, wide_run, mesh):
    root, uninterrupted = wide_run
    resumed = run(ranks, MESHES[mesh], root, load=SAVE, save=None, last=LAST)
    assert resumed["checksums"] == uninterrupted["checksums"]
    expected = {step: uninterrupted["losses"][step] for step in range(SAVE, LAST)}
    assert resumed["losses"] == pytest.approx(expected, abs=1e-5)


def test_there_and_back(ranks, wide_run, tmp_path):
    """pp2 ep2 dp2 -> one rank (trains and saves) -> pp2 ep2 dp2."""
    root, uninterrupted = wide_run
    run(ranks, ONE, root, load=SAVE, save=4, last=4)
    back = run(ranks, WIDE, root, load=4, save=None, last=LAST)
    expected = {step: uninterrupted["losses"][step] for step in range(4, LAST)}
    assert back["losses"] == pytest.approx(expected, abs=1e-5)


def test_lost_moments_would_be_seen(ranks, wide_run, monkeypatch, tmp_path):
    """Negative control: with the moments gone the next loss is still right, the ones after it are not."""
    root, uninterrupted = wide_run
    resumed = run(ranks, ONE, root, load=SAVE, save=None, last=LAST, asynchronous=False, forget_moments=True)
    assert resumed["losses"][SAVE] == pytest.approx(uninterrupted["losses"][SAVE], abs=1e-5)
    assert resumed["losses"][LAST - 1] != pytest.approx(uninterrupted["losses"][LAST - 1], abs=1e-3)


@pytest.mark.parametrize(
    "changes",
    [{"model__tie_embeddings": True}, pytest.param({"train__precision": "bf16"}, marks=pytest.mark.full)],
    ids=["tied", "bf16"],
)
def test_variants_reshard(ranks, tmp_path, changes):
    world, mesh = WIDE
    saved = run(ranks, (world, mesh | changes), tmp_path, load=None, save=2, last=4)
    for other in (WIDE, ONE):
        resumed = run(ranks, (other[0], other[1] | changes), tmp_path, load=2, save=None, last=4)
        assert resumed["checksums"] == saved["checksums"]
        tolerance = 0 if other == WIDE else 1e-5
        assert resumed["losses"][2] == pytest.approx(saved["losses"][2], abs=tolerance)
        later = 0 if other == WIDE else 0.05 if "train__precision" in changes else 1e-5
        assert resumed["losses"][3] == pytest.approx(saved["losses"][3], abs=later)


def test_asynchronous_save_is_the_snapshot(ranks, wide_run, tmp_path):
    """Training goes on while the save runs; what is saved is the state at the save."""
    _, uninterrupted = wide_run
    run(ranks, WIDE, tmp_path, load=None, save=SAVE, last=LAST, asynchronous=True)
    resumed = run(ranks, WIDE, tmp_path, load=SAVE, save=None, last=LAST)
    assert resumed["checksums"] == uninterrupted["checksums"]


def test_reader_sees_whole_tensors(wide_run, ranks, tmp_path):
    """A single process without a process group reads what four ranks saved."""
    root, _ = wide_run
    reader = CheckpointReader(step_folder(root, SAVE))
    reader.verify()
    name = "layers.2.feed_forward.experts.gate_up_proj"
    assert reader.tensors[name].shape == (4, 64, 32)
    whole = reader.read(name)
    assert whole.shape == (4, 64, 32)
    assert (reader.read_rows(name, 1, 3) == whole[1:3]).all()
    run(ranks, ONE, tmp_path, load=None, save=SAVE, last=SAVE)
    single = CheckpointReader(step_folder(tmp_path, SAVE))
    shapes, others = (
        {tensor: (values.shape, values.dtype) for tensor, values in found.tensors.items()} for found in (single, reader)
    )
    assert shapes == others
    for tensor in reader.tensors:
        assert (reader.read(tensor) - single.read(tensor)).abs().max() < 2e-4
