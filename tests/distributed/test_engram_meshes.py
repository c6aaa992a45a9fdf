"""N-gram memory in the pipeline: the loss curve of plain PyTorch on every mesh, whatever is fetched ahead."""

import pytest
import torch
import torch.nn.functional as F

from kmem.config import parse_config
from kmem.model.decoder import Decoder
from kmem.model.engram_reader import table_name, table_rows
from kmem.model.init import initialise_
from kmem.tables import counter_random
from tests.distributed.training_case import small_config, synthetic_addresses, train_case, train_plainly
from tests.hf.models import read_engram
from tests.model.dense_mask import document_mask

STEPS = 6
EXPERTS = {"num_experts": 4, "top_k": 2, "intermediate_size": 32, "first_dense_layers": 1}


def engram_config(**changes):
    """Two tables, on the middle of the model, with everything that a boundary or a branch could break."""
    engram = {
        "layers": [1, 2],
        "orders": [2, 3],
        "heads": 2,
        "rows_per_head": 40,
        "row_dim": 8,
        "boundary": "document",
        "init_std": 0.3,
    }
    defaults = {
        "model__moe": EXPERTS,
        "model__engram": engram,
        "model__hyper_connections": {"branches": 2},
        "engram__optimizer__betas": [0.9, 0.99],
        # Two things multiply rounding: Adam makes a full step of a gradient that is 0 but for rounding, and the gate's
        # square root has a slope of 40 at a score of 1e-5, of which fp32 knows two digits. So a larger eps, and a seed
        # under which no token's score comes so near to 0 in these steps.
        "engram__optimizer__eps": 1e-5,
        "train__init_seed": 1,
        "train__optimizer__lr": 0.003,
    }
    return small_config(**{**defaults, **changes})


MESHES = {
    "one": (1, {}),
    "pipeline": (2, {"parallel__pipeline": 2}),
    "data": (2, {}),
    "expert": (2, {"parallel__expert": 2}),
    "pipeline-expert-data": (4, {"parallel__pipeline": 2, "parallel__expert": 2}),
    "four-stages": (4, {"parallel__pipeline": 4}),
}
VARIANTS = {
    "plain": {},
    "recompute": {"train__recompute": "full"},
    "micro-batch-1": {"train__micro_batch_size": 1},
}


@pytest.fixture(scope="module")
def plain():
    return plain_training(engram_config())


# Every mesh and every variant is in a short case; the product of all is long.
SHORT = {
    ("one", "plain"),
    ("pipeline", "plain"),
    ("data", "micro-batch-1"),
    ("expert", "plain"),
    ("pipeline-expert-data", "recompute"),
    ("four-stages", "plain"),
}
CASES = [
    pytest.param(mesh, variant, marks=() if (mesh, variant) in SHORT else pytest.mark.full)
    for mesh in MESHES
    for variant in VARIANTS
]


@pytest.mark.parametrize(("mesh", "variant"), CASES)
def test_loss_curve_and_tables_equal_plain_pytorch(ranks, plain, mesh, variant):
    world, changes = MESHES[mesh]
    results = ranks.run(world, train_case, engram_config(**changes, **VARIANTS[variant]), STEPS)
    losses, norms, tables = plain
    assert results[0]["losses"] == pytest.approx(losses, abs=1e-6)
    assert results[0]["norms"] == pytest.approx(norms, rel=1e-4)
    for name, table in merged(results).items():
        torch.testing.assert_close(table, tables[name], rtol=0, atol=1e-5)


DEPTHS = [(1, 0, "none"), (1, 1, "none"), (1, 3, "full"), (2, 0, "full"), (2, 2, "none")]


@pytest.mark.parametrize(
    ("data", "cases"),
    [
        (1, [(1, 0, "none"), (1, 3, "full"), (2, 2, "none")]),
        (2, [(1, 0, "none"), (1, 1, "selective"), (2, 2, "full")]),
        pytest.param(1, DEPTHS, marks=pytest.mark.full),
        pytest.param(2, DEPTHS, marks=pytest.mark.full),
    ],
    ids=["one", "data", "one, all depths", "data, all depths"],
)
def test_pipeline_depth_prefetch_and_recomputation_are_bitwise(ranks, data, cases):
    """At equal data parallelism nothing but the place and the time of the work changes."""
    reference = None
    for pipeline, depth, recompute in cases:
        changes = {
            "engram__prefetch_depth": depth,
            "train__recompute": recompute,
            # Stages add up the norm's squares in another order, and ZeRO-1 cuts partitions elsewhere, where the fused
            # AdamW's vectors end and its last elements round otherwise.
            "train__optimizer__clip_norm": None,
            "parallel__zero_stage": 0,
            "train__init_seed": 0,
            "train__optimizer__lr": 0.01,
        }
        tree = engram_config(parallel__pipeline=pipeline, **changes)
        results = ranks.run(pipeline * data, train_case, tree, STEPS)
        found = results[0]["losses"], merged(results)
        reference = reference or found
        assert found[0] == reference[0]
        assert all(torch.equal(found[1][name], table) for name, table in reference[1].items())


def test_evaluation_in_between_changes_nothing(ranks):
    tree = engram_config(engram__prefetch_depth=2)
    (without,) = ranks.run(1, train_case, tree, STEPS)
    (between,) = ranks.run(1, train_case, tree, STEPS, 2)
    assert between["losses"] == without["losses"]
    assert torch.equal(between["rows"][table_name(1)][1], without["rows"][table_name(1)][1])


@pytest.mark.parametrize(
    "changes",
    [
        {"model__engram__preset": "qwen", "model__engram__boundary": "eos"},
        {"model__engram__preset": "deepseek-v4.1", "model__hyper_connections": None},
        {"model__tie_embeddings": True, "engram__store": "mmap", "train__init_seed": 3},  # as above: no score near 0
        {"engram__optimizer__name": "adam_catchup", "engram__optimizer__clip_norm": 0.05, "train__init_seed": 2},
        {"engram__optimizer__name": "sinkhorn_momentum"},
        {"model__engram__layers": [0, 3], "engram__optimizer__name": "rowwise_adagrad"},
    ],
    ids=["qwen", "v4.1", "tied-mapped", "catchup-clipped", "sinkhorn", "first-and-last-layer"],
)
@pytest.mark.full
def test_other_models_on_the_widest_mesh(ranks, tmp_path, changes):
    changes = {**changes, "engram__folder": str(tmp_path)}
    one = ranks.run(1, train_case, engram_config(**changes), 5)
    four = ranks.run(4, train_case, engram_config(parallel__pipeline=2, parallel__expert=2, **changes), 5)
    assert four[0]["losses"] == pytest.approx(one[0]["losses"], abs=1e-5)
    for name, table in merged(one).items():
        torch.testing.assert_close(merged(four)[name], table, rtol=0, atol=1e-4)


@pytest.mark.full
def test_bf16_trains_close_to_fp32(ranks):
    (fp32,) = ranks.run(1, train_case, engram_config(), STEPS)
    changes = {"train__precision": "bf16", "engram__dtype": "bf16", "engram__optimizer__stochastic_rounding": True}
    for world, mesh in ((1, {}), (4, {"parallel__pipeline": 2, "parallel__expert": 2})):
        result = ranks.run(world, train_case, engram_config(**changes, **mesh), STEPS)[0]
        assert result["losses"] == pytest.approx(fp32["losses"], abs=0.1)


def merged(results):
    """Whole tables of the ranks' parts, by name."""
    parts = {}
    for result in results:
        for name, (start, rows) in result["rows"].items():
            parts.setdefault(name, {})[start] = rows
    return {name: torch.cat([rows for _, rows in sorted(by_start.items())]) for name, by_start in parts.items()}


def plain_training(tree):
    """The whole model in plain PyTorch: losses, norms, tables."""
    config = parse_config(tree)
    shape = config.model.shape
    model = Decoder(shape)
    initialise_(model, shape, config.train.init_seed)
    tables = {}
    for layer, rows in table_rows(shape).items():
        stream = counter_random.key(config.train.init_seed, table_name(layer))
        values = counter_random.normal_rows(0, rows, shape.engram.row_dim, stream, shape.engram.init_std)
        tables[layer] = torch.nn.Parameter(torch.from_numpy(values))
    addresses = synthetic_addresses(config)
    sources = {
        layer: lambda ids, weight=weight: F.embedding(ids, weight, sparse=True) for layer, weight in tables.items()
    }

    def loss_of(sequences):
        rows = read_engram(shape, addresses, sources, sequences.input_ids, sequences.document_ids)
        mask = document_mask(sequences.document_ids)
        logits = model.logits(model(sequences.input_ids, sequences.position_ids, mask, memories={"engram": rows}))
        return F.cross_entropy(logits.flatten(0, 1), sequences.labels.flatten())

    named = {table_name(layer): table for layer, table in tables.items()}
    losses, norms, _ = train_plainly(config, model, named, config.engram.optimizer, STEPS, loss_of)
    return losses, norms, {name: table.detach() for name, table in named.items()}


def kernels_case(tree):
    losses = train_case(tree, STEPS)["losses"]
    return losses, torch.are_deterministic_algorithms_enabled()


def test_every_operation_of_a_run_has_a_deterministic_kernel(ranks):
    """On a CPU they are the same ones."""
    found = {on: ranks.run(1, kernels_case, engram_config(train__deterministic=on))[0] for on in (True, False)}
    assert [chosen for _, chosen in found.values()] == [True, False]
    assert found[True][0] == found[False][0]
