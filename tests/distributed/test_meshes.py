"""The loss curve of one global batch does not depend on the mesh: real DeepSpeed, real processes, gloo."""

import pytest
import torch

from kmem.config import parse_config
from kmem.model.balance import updated_selection_bias
from kmem.model.decoder import Decoder
from kmem.model.init import initialise_
from kmem.model.moe import ExpertLayer
from tests.distributed.training_case import small_config, synthetic_sequences, train_case
from tests.model.dense_mask import document_mask

STEPS = 6

MESHES = {
    "pipeline": (2, {"parallel__pipeline": 2}),
    "expert": (2, {"parallel__expert": 2}),
    "pipeline-expert-data": (4, {"parallel__pipeline": 2, "parallel__expert": 2}),
    "pipeline-data": (4, {"parallel__pipeline": 2}),
    "data": (2, {}),
    "four-stages": (4, {"parallel__pipeline": 4}),
    "stage-without-experts": (4, {"parallel__pipeline": 2, "parallel__expert": 2, "model__moe__first_dense_layers": 3}),
}
VARIANTS = {
    "zero-1": {"parallel__zero_stage": 1},
    "zero-0": {"parallel__zero_stage": 0},
    "recompute": {"train__recompute": "full"},
    "recompute-some": {"train__recompute": "selective"},
    "micro-batch-1": {"train__micro_batch_size": 1},
}


# Every mesh and every variant is in a short case; the product of all is long.
SHORT = {
    ("pipeline", "zero-1"),
    ("expert", "zero-1"),
    ("pipeline-expert-data", "zero-0"),
    ("pipeline-expert-data", "recompute"),
    ("pipeline-expert-data", "recompute-some"),
    ("pipeline-data", "micro-batch-1"),
    ("data", "zero-1"),
    ("four-stages", "zero-1"),
    ("stage-without-experts", "zero-1"),
}
CASES = [
    pytest.param(mesh, variant, marks=() if (mesh, variant) in SHORT else pytest.mark.full)
    for mesh in MESHES
    for variant in VARIANTS
]


def gated_config(**changes):
    return small_config(**{"model__moe__shared_expert_gate": True, **changes})


@pytest.mark.parametrize(("mesh", "variant"), CASES)
def test_loss_curve_equals_plain_pytorch(ranks, mesh, variant):
    world, changes = MESHES[mesh]
    assert_plain_curve(ranks, world, gated_config, changes | VARIANTS[variant])


def test_pipeline_depth_and_recomputation_are_bitwise(ranks):
    """At equal data parallelism nothing but the place of the work changes."""
    (reference,) = ranks.run(1, train_case, gated_config(), STEPS)
    for changes in ({}, {"train__recompute": "full"}, {"train__recompute": "selective"}):
        result = ranks.run(2, train_case, gated_config(parallel__pipeline=2, **changes), STEPS)[0]
        assert result["losses"] == reference["losses"]


@pytest.mark.parametrize(
    "changes",
    [
        {"model__tie_embeddings": True},
        {"model__attention": {"kind": "mla", "num_heads": 4, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
                              "qk_rope_head_dim": 8, "v_head_dim": 8}},
        {"model__moe": None},
        {"model__moe__score_function": "softmax", "model__moe__selection_bias": False},
    ],
    ids=["tied", "mla", "dense", "softmax"],
)  # fmt: skip
@pytest.mark.full
def test_other_models_on_the_widest_mesh(ranks, changes):
    (reference,) = ranks.run(1, train_case, small_config(**changes), 5)
    expert = {} if changes.get("model__moe", 0) is None else {"parallel__expert": 2}
    result = ranks.run(4, train_case, small_config(parallel__pipeline=2, **expert, **changes), 5)[0]
    assert result["losses"] == pytest.approx(reference["losses"], abs=1e-5)
    assert result["norms"] == pytest.approx(reference["norms"], rel=1e-4)


@pytest.mark.parametrize("changes", [{"parallel__zero_stage": 0}, {"train__precision": "bf16"}], ids=["zero-0", "bf16"])
@pytest.mark.full
def test_tied_weights_over_stages(ranks, changes):
    """The gradient norm counts the embedding once, though two stages hold it."""
    changes = changes | {"model__tie_embeddings": True}
    (one,) = ranks.run(1, train_case, small_config(**changes), 5)
    two = ranks.run(2, train_case, small_config(parallel__pipeline=2, **changes), 5)[0]
    tolerance = 0.02 if "train__precision" in changes else 1e-5
    assert two["losses"] == pytest.approx(one["losses"], abs=tolerance)
    assert two["norms"] == pytest.approx(one["norms"], rel=10 * tolerance)


def test_every_group_waits_no_longer_than_configured(ranks):
    tree = small_config(parallel={"pipeline": 2, "expert": 2, "timeout_seconds": 77})
    for seconds in ranks.run(4, group_timeouts, tree):
        assert set(seconds) == {77.0}
        assert len(seconds) > 4


def group_timeouts(tree):
    """The timeouts of all process groups of this rank, in seconds."""
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    from tests.distributed.training_case import build

    build(tree)
    groups = [group for group in distributed_c10d._world.pg_map if dist.get_rank(group) >= 0]
    return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]


def test_micro_batch_aux_loss_at_a_fixed_composition_of_micro_batches(ranks):
    """The Switch loss depends on which sequences share a micro-batch; dealt in turn, that does not change with dp."""
    changes = {"model__moe__aux_loss": 0.05, "model__moe__sequence_aux_loss": 0.0}
    (reference,) = ranks.run(1, train_case, small_config(**changes), STEPS)
    result = ranks.run(4, train_case, small_config(parallel__pipeline=2, parallel__expert=2, **changes), STEPS)[0]
    assert result["losses"] == pytest.approx(reference["losses"], abs=1e-5)
    (other,) = ranks.run(1, train_case, small_config(train__micro_batch_size=8, **changes), STEPS)
    assert other["losses"] != pytest.approx(reference["losses"], abs=1e-5), "the control must differ"


@pytest.mark.full
def test_bf16_trains_close_to_fp32(ranks):
    """On one rank, on the widest mesh, and with a stage that has no experts, on which DeepSpeed's own step hangs."""
    (fp32,) = ranks.run(1, train_case, small_config(), 10)
    wide = {"parallel__pipeline": 2, "parallel__expert": 2}
    for world, changes in ((1, {}), (4, wide), (4, wide | {"model__moe__first_dense_layers": 3})):
        if "model__moe__first_dense_layers" in changes:
            (fp32,) = ranks.run(1, train_case, small_config(model__moe__first_dense_layers=3), 10)
        result = ranks.run(world, train_case, small_config(train__precision="bf16", **changes), 10)[0]
        assert result["losses"] == pytest.approx(fp32["losses"], abs=0.05)
        assert result["losses"][-1] < result["losses"][0] - 0.2


def deepspeeds_sums_case(tree, steps):
    """As `train_case`, with DeepSpeed's own way to add a gradient to its sum."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    from kmem.parallel.engine import UnclippedBF16Optimizer

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(UnclippedBF16Optimizer, "_update_hp_grad", BF16_Optimizer._update_hp_grad)
        return train_case(tree, steps)


@pytest.mark.parametrize("world", [1, pytest.param(4, marks=pytest.mark.full)])
def test_gradients_are_added_as_deepspeed_adds_them(ranks, world):
    """To the last bit, but without a copy in fp32."""
    mesh = {} if world == 1 else {"parallel__pipeline": 2, "parallel__expert": 2}
    tree = small_config(train__precision="bf16", train__micro_batch_size=1, **mesh)
    ours, theirs = (ranks.run(world, case, tree, 4)[0] for case in (train_case, deepspeeds_sums_case))
    assert ours["losses"] == theirs["losses"]
    assert ours["norms"] == theirs["norms"]


def plain_training(tree):
    """Autograd and AdamW on the whole model and the whole batch, written out."""
    config = parse_config(tree)
    shape = config.model.shape
    model = Decoder(shape)
    initialise_(model, shape, config.train.init_seed)
    optimizer = config.train.optimizer
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    adam = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": optimizer.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.eps,
    )  # fmt: skip
    batch = config.train.global_batch_size
    losses, norms = [], []
    for step in range(STEPS):
        sequences = synthetic_sequences(list(range(step * batch, (step + 1) * batch)))
        loads = {}
        for layer, module in enumerate(model.layers):
            if isinstance(module.feed_forward, ExpertLayer):
                loads[layer] = []
                module.feed_forward.on_routing = lambda statistics, load=loads[layer]: load.append(statistics.counts_E)
        hidden = model(sequences.input_ids, sequences.position_ids, document_mask(sequences.document_ids))
        logits = model.logits(hidden)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), sequences.labels.flatten())
        adam.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), optimizer.clip_norm).item())
        adam.step()
        for layer, counts in loads.items():
            routers = model.layers[layer].feed_forward.iteration_routers()
            assert len(counts) == len(routers)
            for router in dict.fromkeys(routers):  # one that serves several iterations follows their summed load
                load = sum(counts_E for owner, counts_E in zip(routers, counts, strict=True) if owner is router)
                router.selection_bias.copy_(
                    updated_selection_bias(router.selection_bias, load, config.model.moe.bias_update_rate)
                )
        losses.append(loss.item())
    return losses, norms


def assert_plain_curve(ranks, world, make_config, changes):
    """Training `make_config(**changes)` on a mesh gives plain PyTorch's losses and gradient norms on every rank."""
    tree = make_config(**changes)
    dense_layers = tree["model"]["moe"]["first_dense_layers"]
    if (make_config, dense_layers) not in _PLAIN_CURVES:
        plain = make_config(model__moe__first_dense_layers=dense_layers)
        _PLAIN_CURVES[make_config, dense_layers] = plain_training(plain)
    losses, norms = _PLAIN_CURVES[make_config, dense_layers]
    results = ranks.run(world, train_case, tree, STEPS)
    assert max(norms) > 2 * tree["train"]["optimizer"]["clip_norm"], "clipping must be active"
    assert results[0]["losses"] == pytest.approx(losses, abs=1e-5)
    assert results[0]["norms"] == pytest.approx(norms, rel=1e-4)
    assert all(result == results[0] for result in results), "every rank reports the same step"


_PLAIN_CURVES = {}
