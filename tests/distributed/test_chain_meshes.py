"""Chains of experts on meshes: losses, state and observations of a global batch do not depend on the mesh."""

import pytest
import torch

from tests.distributed.test_meshes import STEPS, assert_plain_curve, plain_training
from tests.distributed.training_case import build, checkpoint_case, small_config, train_case, train_step

MESHES = {
    "pipeline": (2, {"parallel__pipeline": 2}),
    "expert": (2, {"parallel__expert": 2}),
    "pipeline-expert-data": (4, {"parallel__pipeline": 2, "parallel__expert": 2}),
    "stage-without-experts": (4, {"parallel__pipeline": 2, "parallel__expert": 2, "model__moe__first_dense_layers": 3}),
}
VARIANTS = {
    "zero-1": {},
    "zero-0, recompute": {"parallel__zero_stage": 0, "train__recompute": "full"},
    "micro-batch-1": {"train__micro_batch_size": 1},
}
CHAINS = {
    "released": {"iterations": 2, "norm": "once", "stream": "normed", "gates": "shared"},
    "frozen, outer": {"iterations": 2, "gates": "frozen", "residual": "outer"},
    "retrofit": {"iterations": 3, "retrofit_scale": True, "shared_experts": "once"},
}


def chain_config(chain=None, **changes):
    # Where two experts' scores nearly tie, rounding decides, and curves part: with seed 2 by 1e-4, with 0 by 1e-5, with
    # 1, 3 and 4 nothing comes so near in these steps.
    changes = {"train__init_seed": 1, **changes}
    return small_config(model__moe__chain=chain or {"iterations": 2}, **changes)


# Every mesh and every variant is in a short case; other chains run with ZeRO-1 on the widest mesh.
SHORT = {
    ("pipeline", "zero-1"),
    ("expert", "zero-1"),
    ("pipeline-expert-data", "zero-0, recompute"),
    ("pipeline-expert-data", "micro-batch-1"),
    ("stage-without-experts", "zero-1"),
}
CASES = [
    pytest.param(mesh, variant, marks=() if (mesh, variant) in SHORT else pytest.mark.full)
    for mesh in MESHES
    for variant in VARIANTS
]


@pytest.mark.parametrize(("mesh", "variant"), CASES)
def test_loss_curve_equals_plain_pytorch(ranks, mesh, variant):
    world, changes = MESHES[mesh]
    assert_plain_curve(ranks, world, chain_config, changes | VARIANTS[variant])


@pytest.mark.parametrize("chain", CHAINS)
def test_other_chains_on_the_widest_mesh(ranks, chain):
    tree = chain_config(CHAINS[chain], parallel__pipeline=2, parallel__expert=2)
    losses, norms = plain_training(chain_config(CHAINS[chain]))
    result = ranks.run(4, train_case, tree, STEPS)[0]
    assert result["losses"] == pytest.approx(losses, abs=1e-5)
    assert result["norms"] == pytest.approx(norms, rel=1e-4)


@pytest.mark.full
def test_bf16_trains_close_to_fp32(ranks):
    chain = {"iterations": 2, "retrofit_scale": True}
    (fp32,) = ranks.run(1, train_case, chain_config(chain), 10)
    tree = chain_config(chain, train__precision="bf16", parallel__pipeline=2, parallel__expert=2)
    result = ranks.run(4, train_case, tree, 10)[0]
    assert result["losses"] == pytest.approx(fp32["losses"], abs=0.05)
    assert result["losses"][-1] < result["losses"][0] - 0.2


def test_pipeline_depth_and_recomputation_are_bitwise(ranks):
    (reference,) = ranks.run(1, train_case, chain_config(), STEPS)
    for changes in ({}, {"train__recompute": "full"}):
        result = ranks.run(2, train_case, chain_config(parallel__pipeline=2, **changes), STEPS)[0]
        assert result["losses"] == reference["losses"]


def observation_case(tree):
    """One step with co-activation, one without."""
    pipeline = build(tree)
    first = train_step(pipeline, 0, sampled=True).routing
    second = train_step(pipeline, 1).routing
    assert second.coactivation is None
    return first.counts, first.means, first.coactivation


def test_observations_do_not_depend_on_the_mesh(ranks):
    """Nor on recomputation, which would count twice."""
    ((counts, means, pairs),) = ranks.run(1, observation_case, chain_config())
    chosen = 8 * 16 * 2  # tokens x top_k
    assert counts[1:].sum(-1).eq(chosen).all()
    assert counts[0].eq(0).all()
    assert pairs.shape == (4, 1, 4, 4)
    assert pairs[1:].sum((-1, -2)).eq(chosen * 2).all()
    assert torch.equal(pairs[1:].sum(-1)[:, 0], 2 * counts[1:, 0])
    assert torch.equal(pairs[1:].sum(-2)[:, 0], 2 * counts[1:, 1])
    torch.testing.assert_close(means["overlap"][1:, 1], pairs[1:, 0].diagonal(dim1=-2, dim2=-1).sum(-1) / chosen)
    assert means["update_size"][1:].gt(0).all()
    tree = chain_config(parallel__pipeline=2, parallel__expert=2, train__recompute="full")
    for other_counts, other_means, other_pairs in ranks.run(4, observation_case, tree):
        assert torch.equal(other_counts, counts)
        assert torch.equal(other_pairs, pairs)
        for name, value in means.items():
            torch.testing.assert_close(other_means[name], value, rtol=1e-5, atol=1e-6)


def test_a_checkpoint_continues_on_another_mesh(ranks, tmp_path):
    """Routers, biases and norms of every iteration are in it; equal checksums of every tensor, equal next losses."""
    chain = {"iterations": 3, "retrofit_scale": True}
    wide = chain_config(chain, parallel__pipeline=2, parallel__expert=2)
    saved = ranks.run(4, checkpoint_case, wide, str(tmp_path), None, 2, 4)[0]
    names = {name.removeprefix("weight/layers.2.feed_forward.") for name in saved["checksums"]}
    assert {"routers.2.weight", "routers.2.selection_bias", "norms.2.weight", "retrofit_scale.2"} <= names
    for world, tree in ((4, wide), (1, chain_config(chain))):
        resumed = ranks.run(world, checkpoint_case, tree, str(tmp_path), 2, None, 4)[0]
        assert resumed["checksums"] == saved["checksums"]
        expected = {step: saved["losses"][step] for step in (2, 3)}
        assert resumed["losses"] == pytest.approx(expected, abs=0 if world == 4 else 1e-5)
