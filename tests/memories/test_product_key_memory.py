"""Product-key memory: a pool of rows that hidden states choose from."""

import math
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open

from kmem.checkpoint.controls import Choices
from kmem.checkpoint.pieces import CheckpointError
from kmem.checkpoint.reader import CheckpointReader
from kmem.checkpoint.store import step_folder
from kmem.config import parse_config
from kmem.data.reader import open_data
from kmem.eval.checkpoint import held_out_figures
from kmem.model.decoder import Decoder
from kmem.model.init import TRUNCATION, initialise_
from kmem.model.memory_kind import OFF
from kmem.model.memory_kinds import KINDS
from kmem.model.parameter_counts import count_parameters
from kmem.model.product_key_memory import TABLE, ProductKeyMemory, SourcedPool, shuffled, weighted_rows
from kmem.parallel.mesh import Mesh
from kmem.parallel.stages import stages_with
from kmem.train.dry_run import print_dry_run, rank_bytes
from kmem.train.load_plan import plan_load
from tests.distributed.training_case import build, small_config, state_checksums, train_step
from tests.hf.loaded import opened
from tests.hf.models import EXPERTS, GQA, write_run
from tests.hf.models import model as tiny_model
from tests.memories.case import (
    LAST,
    MESHES,
    SAVE,
    MemoryCase,
    Plain,
    check_generation,
    check_logits,
    check_round_trip,
    compare,
    folder_of,
    hf_model,
    memory_case,
    merged,
    token_ids,
    wrong,
)
from tests.model import tiny
from tests.model.dense_mask import document_mask
from tests.train.test_trainer import metrics
from tests.train.trainer_case import trainer_case

NAME = "product_key_memory"
SECTION = {"layers": [1, 3], "num_keys": 20, "key_dim": 16, "heads": 2, "top_k": 3}
ROWS = 400


class Reading:
    """The reference of what layers read: sums over the rows of a whole table, written out. Remembers look-ups."""

    def __init__(self):
        self.looked_up = []

    def __call__(self, shape, tables, ids, documents, control):
        (table,) = tables.values()
        moved = random.Random("product_key_memory shuffled").randrange(1, len(table)) if control == "shuffled" else 0

        def pool(rows, weights):
            self.looked_up.append((rows, weights.detach()))
            values = F.embedding((rows + moved).flatten(1) % len(table), table, sparse=table.requires_grad)
            return (values * weights.flatten(1)[..., None]).sum(1)

        return dict.fromkeys(shape.product_key_memory.layers, pool)

    def figures(self, looked_up, rows):
        """used_share, usage_kl and top_weight of these look-ups."""
        share = torch.zeros(rows, dtype=torch.float64)
        for ids, weights in looked_up:
            for row, weight in zip(ids.flatten().tolist(), weights.flatten().tolist(), strict=True):
                share[row] += weight
        share /= share.sum()
        used = share[share > 0]
        return {
            "used_share": len(used) / rows,
            "usage_kl": float((used * (used * rows).log()).sum()),
            "top_weight": float(torch.cat([weights.amax(-1).flatten() for _, weights in looked_up]).mean()),
        }


CASE = MemoryCase(NAME, SECTION, Reading())


# The layer


def layer(dtype=torch.float32, **section):
    """A module with weights that all matter, as `feed` computes it in a model of hidden size 32."""
    chosen = {"layers": [1], "num_keys": 9, "key_dim": 10, "heads": 2, "top_k": 4, **section}
    module = ProductKeyMemory(tiny.shape(product_key_memory=chosen))
    return tiny.randomise_(module).to(dtype).requires_grad_()


def brute_force(module, x, values):
    """The formulas, with the scores of all n^2 pairs."""
    weight = dict(module.named_parameters())
    heads, _, _, half = weight["keys"].shape
    queries = (x @ weight["query_proj.weight"].T + weight["query_proj.bias"]).view(-1, heads, 2, half)
    keys = weight["keys"]
    if module.query_norm is not None:
        queries, keys = (
            part / (part.square().mean(-1, keepdim=True) + module.query_norm.eps).sqrt() * weight[f"{name}.weight"]
            for part, name in ((queries, "query_norm"), (keys, "key_norm"))
        )
    out = torch.zeros(len(queries), values.shape[1], dtype=values.dtype)
    chosen = []
    for head in range(heads):
        first, second = (queries[:, head, part] @ keys[head, part].T for part in (0, 1))
        pairs = (first[:, :, None] + second[:, None, :]).flatten(1)
        scores, ids = pairs.topk(module.top_k)
        chosen.append(ids)
        out = out + (scores.softmax(-1)[..., None] * values[ids]).sum(1)
    gated = out.view_as(x) * F.silu(x @ weight["gate_proj.weight"].T)
    return gated @ weight["out_proj.weight"].T, torch.stack(chosen, 1)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("top_k", [1, 4, 9])
def test_the_layer_is_its_formulas(top_k, qk_norm):
    """Values and all gradients, in both ways to choose the best."""
    module = layer(top_k=top_k, qk_norm=qk_norm)
    values, twin = (tiny.random(81, 32, seed=5).requires_grad_() for _ in range(2))
    x, again = (tiny.random(2, 7, 32).requires_grad_() for _ in range(2))
    found = module.feed(x, None, lambda ids, weights: weighted_rows(values, ids, weights))
    expected, chosen = brute_force(module, again, twin)
    assert torch.equal(module.choose(x)[0], chosen)
    torch.testing.assert_close(found, expected)
    parameters = list(module.parameters())
    grads = torch.autograd.grad(found.square().sum(), [x, values, *parameters])
    others = torch.autograd.grad(expected.square().sum(), [again, twin, *parameters])
    for one, other in zip(grads, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    if top_k > 1:  # the softmax of one score is 1, whatever the query
        assert all(grad.abs().sum() > 0 for grad in grads)


@torch.no_grad()
def test_equal_scores_choose_lower_rows():
    module = layer(top_k=5)
    x = tiny.random(1, 6, 32)
    module.query_proj.weight.zero_()
    module.query_proj.bias.zero_()
    ids, weights = module.choose(x)
    assert torch.equal(ids, torch.arange(5).expand(6, 2, 5))
    assert torch.equal(weights, torch.full((6, 2, 5), 0.2))
    module = layer(top_k=9)
    module.keys[:, :, 4:] = module.keys[:, :, 3:4]  # equal keys from key 3 on
    halves = module.choose(x)[0]
    rows, columns = halves // 9, halves % 9
    for part in (rows, columns):
        for places in part.flatten(0, 1).tolist():
            seen = [place for place in dict.fromkeys(places) if place >= 3]
            assert seen == sorted(seen)


@torch.no_grad()
@pytest.mark.parametrize("top_k", [3, 9])
def test_weights_are_fp32_in_bf16(top_k):
    module, x = layer(torch.bfloat16, top_k=top_k), tiny.random(2, 7, 32).bfloat16()
    ids, weights = module.choose(x)
    assert (ids.dtype, weights.dtype) == (torch.int64, torch.float32)
    torch.testing.assert_close(weights.sum(-1), torch.ones(14, 2))
    assert (weights[..., :-1] >= weights[..., 1:]).all(), "best first"
    assert all(len(set(row)) == top_k for row in ids.flatten(0, 1).tolist())
    values = tiny.random(81, 32, seed=5)
    assert module.feed(x, None, SourcedPool(values.__getitem__)).dtype == torch.bfloat16


@torch.no_grad()
def test_a_pool_in_one_process_reads_each_row_once():
    values, asked = tiny.random(30, 8), []

    def source(rows):
        asked.append(rows)
        return values[rows]

    ids = torch.randint(30, (6, 2, 3), generator=torch.Generator().manual_seed(0))
    weights = tiny.random(6, 2, 3, seed=3)
    expected = torch.einsum("nhkd,nhk->nd", values[ids], weights)
    torch.testing.assert_close(SourcedPool(source)(ids, weights), expected)
    assert asked[0].tolist() == sorted(set(ids.flatten().tolist()))


def test_shuffled_reads_the_row_of_another_pair():
    shape = tiny.shape(product_key_memory={"layers": [0], "num_keys": 9, "key_dim": 4, "top_k": 2})
    seen = []
    pool = shuffled(lambda ids, weights: seen.append(ids), shape)
    pool(torch.arange(81), None)
    assert sorted(seen[0].tolist()) == list(range(81))
    assert (seen[0] != torch.arange(81)).all()


def test_initial_values():
    section = {"layers": [0, 2], "num_keys": 64, "key_dim": 32, "heads": 4, "top_k": 3, "qk_norm": True}
    shape = tiny.shape(product_key_memory=section, init_std=0.7, depth_scaled_init=True)
    model = Decoder(shape)
    initialise_(model, shape, seed=3)
    first, second = (model.layers[place].product_key_memory.state_dict() for place in (0, 2))
    hidden, truncated = 32, 0.98658  # standard deviation of a unit normal that is cut at 3
    for name, bound in (("query_proj.weight", math.sqrt(6 / (hidden + 4 * 32))), ("keys", 1 / math.sqrt(32))):
        values = first[name]
        assert 0.99 * bound < values.max() <= bound
        assert -bound <= values.min() < -0.99 * bound
        assert float(values.std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)
        assert abs(float(values.mean())) < 0.05 * bound
    for name in ("gate_proj.weight", "out_proj.weight"):
        assert float(first[name].std()) == pytest.approx(truncated * hidden**-0.5, rel=0.05)
        assert first[name].abs().max() <= TRUNCATION * hidden**-0.5
    assert not first["query_proj.bias"].any()
    assert all((first[f"{part}_norm.weight"] == 1).all() for part in ("query", "key"))
    assert all(first[name].ndim == 1 or not torch.equal(first[name], second[name]) for name in first)
    assert KINDS[NAME].init_std(shape) == hidden**-0.5
    # A layer alone, as a stage builds it, has the same.
    alone = ProductKeyMemory(shape)
    initialise_(alone, shape, 3, f"layers.2.{NAME}.")
    assert all(torch.equal(tensor, second[name]) for name, tensor in alone.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("moe", [None, tiny.SOFTMAX])
def test_it_replaces_the_feed_forward_and_off_adds_nothing(moe):
    section = {"layers": [1], "num_keys": 9, "key_dim": 4, "top_k": 2}
    decoder = tiny.decoder(tiny.shape(moe=moe, product_key_memory=section))
    assert [decoder_layer.feed_forward is None for decoder_layer in decoder.layers] == [False, True, False]
    ids, positions = tiny.tokens()
    zeros = SourcedPool(torch.zeros(81, 32).__getitem__)
    found = decoder(ids, positions, memories={NAME: {1: OFF}})
    assert torch.equal(found, decoder(ids, positions, memories={NAME: {1: zeros}}))
    values = SourcedPool(tiny.random(81, 32).__getitem__)
    assert not torch.equal(found, decoder(ids, positions, memories={NAME: {1: values}}))


# Training


def tree(**changes):
    """A configuration of the small model. (Under some seeds, rounding decides between two rows for one of the tokens,
    and losses differ.)"""
    return CASE.config(**{"train__init_seed": 1, **changes})


def plainly(**changes):
    """The same run in plain PyTorch."""
    return Plain(MemoryCase(NAME, {}, Reading()), parse_config(tree(**changes)))


def check(results, plain, first=0):
    """As `compare`; also the figures, and that all copies of the pool are equal. Returns the number of copies."""
    compare(results, plain, first)
    layers, rows = len(plain.shape.product_key_memory.layers), len(plain.tables[TABLE])
    figures = plain.case.read.figures(plain.case.read.looked_up[first * layers : LAST * layers], rows)
    for result in results:
        assert result["figures"] == {"pool": pytest.approx(figures, rel=1e-4)}
    return check_copies(results)


def check_copies(results):
    """The copies of the stages are equal; returns their number."""
    copies = {}
    for result in results:
        for start, rows in result["rows"].values():
            copies.setdefault(start, []).append(rows)
    assert all(torch.equal(rows, held[0]) for held in copies.values() for rows in held)
    (number,) = {len(held) for held in copies.values()}
    return number


def run(ranks, world, *arguments, **changes):
    return ranks.run(world, memory_case, tree(**changes), NAME, *arguments)


EXACT = {"parallel__zero_stage": 0}  # ZeRO-1 cuts partitions where the fused AdamW rounds otherwise
WIDE = {"parallel__pipeline": 2}


@pytest.fixture(scope="module")
def plain():
    return plainly()


@pytest.fixture(scope="module")
def alone(ranks):
    """One rank with one stage."""
    return run(ranks, 1, **EXACT)


@pytest.fixture(scope="module")
def wide(ranks, tmp_path_factory):
    """(folder of its checkpoint, results) of two stages with layers of the pool, of two ranks each."""
    root = str(tmp_path_factory.mktemp("pool"))
    return root, run(ranks, 4, root, None, SAVE, **WIDE)


def test_one_rank_trains_as_plain_pytorch(alone, plain):
    assert check(alone, plain) == 1


def test_stages_and_ranks_train_as_plain_pytorch(wide, plain):
    """With the default ZeRO-1."""
    assert check(wide[1], plain) == 2


def test_stages_and_recomputation_change_no_bit(ranks, alone):
    two = run(ranks, 2, train__recompute="full", **WIDE, **EXACT)
    assert check_copies(two) == 2
    for part in ("losses", "checksums", "held_out"):
        assert two[0][part] == alone[0][part], part
    assert two[0]["figures"]["pool"] == pytest.approx(alone[0]["figures"]["pool"])


@pytest.mark.full
@pytest.mark.parametrize(("data", "top_k"), [(1, 3), (1, 10), (2, 3)])
def test_more_stages_and_stores_change_no_bit(ranks, data, top_k, tmp_path):
    kept = {f"{NAME}__folder": str(tmp_path), f"model__{NAME}__top_k": top_k, **EXACT}
    reference = run(ranks, data, **kept)
    for stages, recompute, store in [
        (1, "full", "mmap"),
        (2, "none", "mmap"),
        (2, "selective", "host"),
        (4, "full", "device"),
    ]:
        if stages * data <= 4:
            changes = {"parallel__pipeline": stages, "train__recompute": recompute, f"{NAME}__store": store}
            found = run(ranks, stages * data, **changes, **kept)
            assert check_copies(found) == min(stages, 2)
            for part in ("losses", "checksums", "held_out"):
                assert found[0][part] == reference[0][part], (stages, recompute, store, part)


LAYERS = {"one": [2], "first-and-last": [0, 3], "one stage": [0, 1], "all": [0, 1, 2, 3]}


@pytest.mark.full
@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("mesh", ["pipeline-expert-data", "four-stages"])
def test_layers_on_some_stages(ranks, mesh, layers):
    world, changes = MESHES[mesh]
    changes = {**changes, f"model__{NAME}": {**SECTION, "layers": LAYERS[layers], "num_keys": 30}}
    stages = changes["parallel__pipeline"]
    having = stages_with(parse_config(tree(**changes)), Mesh(0, stages, world // stages, 1), LAYERS[layers])
    assert check(run(ranks, world, **changes), plainly(**changes)) == len(having)


VARIANTS = {
    "normed and clipped": {
        f"model__{NAME}": {**SECTION, "qk_norm": True, "num_keys": 30},
        "train__optimizer": {"lr": 0.003, "clip_norm": 0.5},
    },
    "many rows": {f"model__{NAME}__top_k": 12, f"model__{NAME}__num_keys": 40},
    "dense": {"model__moe": None, "train__init_seed": 2},
}


@pytest.mark.full
@pytest.mark.parametrize("mesh", MESHES)
def test_other_meshes(ranks, mesh):
    world, changes = MESHES[mesh]
    check(run(ranks, world, **changes), plainly(**changes))


@pytest.mark.full
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mesh", ["data", "four-stages"])
def test_other_models(ranks, mesh, variant):
    world, changes = MESHES[mesh]
    changes = {**changes, **VARIANTS[variant]}
    check(run(ranks, world, **changes), plainly(**changes))


@pytest.mark.full
@pytest.mark.parametrize(
    "optimizer",
    [
        {"name": "adam_catchup", "weight_decay": 0.1, "clip_norm": 0.05},
        {"name": "rowwise_adagrad"},
        {"name": "sinkhorn_momentum", "lr_multiplier": 1.0},
    ],
    ids=["catchup-clipped", "adagrad", "sinkhorn"],
)
def test_row_optimizers_keep_copies_equal(ranks, optimizer):
    (one,) = run(ranks, 1, **{f"{NAME}__optimizer": optimizer})
    four = run(ranks, 4, **{f"{NAME}__optimizer": optimizer, **WIDE})
    assert check_copies(four) == 2
    assert four[0]["losses"] == pytest.approx(one["losses"], abs=1e-5)
    torch.testing.assert_close(merged(four)[TABLE], merged([one])[TABLE], rtol=0, atol=1e-4)


@pytest.mark.full
def test_bf16_trains_close_to_fp32_and_copies_round_alike(ranks, alone):
    narrow = {"train__precision": "bf16", f"{NAME}__dtype": "bf16", f"{NAME}__optimizer__stochastic_rounding": True}
    for world, mesh in ((1, {}), (4, WIDE)):
        results = run(ranks, world, **narrow, **mesh)
        assert results[0]["losses"] == pytest.approx(alone[0]["losses"], abs=0.1)
        assert check_copies(results) == (1 if world == 1 else 2)


def refused_case(config):
    """One rank has a row gradient that is not finite in the second step: (error, whether anything has changed)."""
    from kmem.parallel.engine import NonFiniteStepError
    from kmem.tables.working_set import WorkingSet

    def state():
        tables = pipeline.stage_tables.tables
        rows = [table.read_rows(table.local.start, table.local.stop) for table in tables.values()]
        return state_checksums(pipeline), [part.numpy().tobytes() for part in rows]

    def spoiled(working_set, index, gradient):
        accumulate(working_set, index, gradient)
        working_set.gradient[-1, 0] = float("nan")

    pipeline, accumulate, error = build(config), WorkingSet.accumulate, ""
    train_step(pipeline, 0)
    before = state()
    if dist.get_rank() == dist.get_world_size() - 1:
        WorkingSet.accumulate = spoiled
    try:
        train_step(pipeline, 1)
    except NonFiniteStepError as refused:
        error = str(refused)
    finally:
        WorkingSet.accumulate = accumulate
    changed = state() != before
    pipeline.close()
    return error, changed


def test_a_row_gradient_that_is_not_finite_is_refused_everywhere(ranks):
    for error, changed in ranks.run(4, refused_case, tree(**WIDE)):
        assert "gradient of table rows" in error
        assert not changed


# Checkpoints


def test_resumed_bit_for_bit(ranks, wide):
    root, whole = wide
    resumed = run(ranks, 4, root, SAVE, **WIDE)
    assert resumed[0]["checksums"] == whole[0]["checksums"]
    assert resumed[0]["losses"] == {step: whole[0]["losses"][step] for step in range(SAVE, LAST)}
    assert resumed[0]["held_out"] == whole[0]["held_out"]


OTHER = {
    "one": (1, {f"{NAME}__store": "mmap"}),
    "data": (2, {"train__micro_batch_size": 1, f"{NAME}__store": "host"}),
    "four-stages": (4, {"parallel__pipeline": 4}),
}


@pytest.mark.parametrize("mesh", [pytest.param(mesh, marks=[pytest.mark.full] * (mesh != "data")) for mesh in OTHER])
def test_another_mesh_goes_on(ranks, wide, plain, mesh, tmp_path):
    """With rows kept elsewhere, and micro-batches of another size."""
    root, whole = wide
    world, changes = OTHER[mesh]
    changes = {**changes, f"{NAME}__folder": str(tmp_path)}
    resumed = run(ranks, world, root, SAVE, **changes)
    assert resumed[0]["checksums"][SAVE] == whole[0]["checksums"][SAVE]
    state = {f"{part}/{TABLE}" for part in ("weight", "first_moment", "second_moment", "step")}
    assert state <= resumed[0]["checksums"][SAVE].keys()
    check(resumed, plain, SAVE)


def test_a_checkpoint_has_the_pool_once(wide):
    root, whole = wide
    reader = CheckpointReader(step_folder(Path(root), SAVE))
    assert [name for name in reader.tensors if NAME in name and "layers." not in name] == [TABLE]
    assert reader.read(TABLE).shape == (ROWS, 32)
    stored = Counter()
    for file in reader.folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened_file:
            for name in sorted(opened_file.keys()):
                if TABLE in name:
                    stored[name.split("/")[0]] += math.prod(opened_file.get_slice(name).get_shape())
    assert {f"{part}/{TABLE}" for part in stored} == {name for name in whole[0]["checksums"][SAVE] if TABLE in name}
    for part in ("weight", "first_moment", "second_moment"):
        assert stored[part] == ROWS * 32


def planned(reader, section):
    """What loading a checkpoint does for a run with this section, or without."""
    model = tiny_model(GQA, None, **({} if section is None else {NAME: section}))
    return plan_load(reader.folder, reader.commit, reader.config.model_copy(update={"model": model}), {})


def test_what_a_checkpoint_cannot_become(tmp_path):
    section = {**SECTION, "layers": [0, 2]}
    without = write_run(tmp_path / "without", tiny_model(GQA, None))
    with pytest.raises(CheckpointError, match=rf"^model\.{NAME}: .*without.*feed-forward"):
        planned(without, section)
    folder = folder_of(CASE, tmp_path, hf_model(CASE, GQA, None, **{NAME: section}))
    assert not planned(folder.run, section).added
    with pytest.raises(CheckpointError, match=rf"\bmodel\.{NAME}\b"):
        planned(folder.run, None)
    for change in ({"num_keys": 10}, {"heads": 1}, {"top_k": 2}, {"key_dim": 8}, {"layers": [0]}, {"qk_norm": True}):
        (field,) = change
        with pytest.raises(CheckpointError, match=rf"^model\.{NAME}\.{field}\b"):
            planned(folder.run, {**section, **change})


# Folders of Hugging Face


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    section = {**SECTION, "layers": [0, 2], "qk_norm": True}
    return folder_of(CASE, tmp_path_factory.mktemp("folder"), hf_model(CASE, GQA, EXPERTS, **{NAME: section}))


def test_transformers_computes_kmems_logits(folder):
    check_logits(folder)


@pytest.mark.parametrize("way", ["cache", pytest.param("beams", marks=pytest.mark.full)])
def test_generation_with_a_cache_is_generation(folder, way):
    check_generation(folder, [way])


@pytest.mark.full
def test_other_ways_to_generate(folder):
    check_generation(folder, ["static cache", "prompt in chunks"], ["assistant", "prompt lookup"])


def test_imported_bit_for_bit(folder, tmp_path):
    check_round_trip(folder, tmp_path / "run")


@torch.no_grad()
def test_saved_by_transformers_it_loads_again(folder, tmp_path):
    model, ids = opened(folder.out), token_ids()
    model.save_pretrained(tmp_path)
    for kept in ("device", "mmap"):
        assert torch.equal(opened(tmp_path, tables=kept)(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match='tables="device"'):
        opened(folder.out, tables="mmap").save_pretrained(tmp_path / "again")
    embeddings = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeddings).logits, model(ids).logits)


def test_the_pool_learns_in_transformers(folder):
    """Its rows are one parameter, whose gradients of both layers are summed."""
    model, ids = opened(folder.out).train(), token_ids()
    model(ids).logits.square().sum().backward()
    table = folder.tables[TABLE].requires_grad_()
    folder.logits(ids).square().sum().backward()
    found = torch.cat([value.grad for name, value in model.named_parameters() if name.startswith(f"{TABLE}.parts")])
    torch.testing.assert_close(found, table.grad.to_dense(), rtol=1e-4, atol=1e-4)
    folder.tables[TABLE].requires_grad_(False)


# Evaluation


def test_held_out_losses_are_those_of_the_run_and_of_plain_pytorch(ranks, run_config, corpus):
    evaluation = {"every": 2, "sequences": 6, "controls": [f"{NAME}=off", f"{NAME}=shuffled"]}
    config, _ = run_config(
        train__steps=2, evaluation=evaluation, **{f"model__{NAME}": SECTION, NAME: {"optimizer": {"lr_multiplier": 20}}}
    )
    assert {answer["error"] for answer in ranks.run(2, trainer_case, config)} == {None}
    reader = CheckpointReader(Path(config["folder"]) / config["name"])
    shape, trained = reader.config.model.shape, metrics(config, "evaluation")[-1]
    decoder, tables = Decoder(shape).eval(), {TABLE: reader.read(TABLE)}
    decoder.load_state_dict({name: reader.read(name) for name in reader.tensors if name != TABLE})
    held_out = open_data(reader.config.data, 257).validation
    batch = held_out.read(held_out.spread(6))
    for control in ("on", "off", "shuffled"):
        figures = held_out_figures(reader, [str(corpus)], Choices({NAME: control}), sequences=6)[str(corpus)]
        read = Reading()(shape, tables, batch.input_ids, None, control)
        if control == "off":
            read = dict.fromkeys(read, OFF)
        with torch.no_grad():
            hidden = decoder(
                batch.input_ids, batch.position_ids, document_mask(batch.document_ids), memories={NAME: read}
            )
            expected = F.cross_entropy(decoder.logits(hidden).flatten(0, 1), batch.labels.flatten()).item()
        assert figures["loss"] == pytest.approx(expected, abs=1e-5)
        found = trained if control == "on" else trained["controls"][f"{NAME}={control}"]
        assert found["loss"] == pytest.approx(expected, abs=1e-5)


# Sizes


PUBLISHED = {"layers": [4, 12, 20]}
"""Memory+ with 373M parameters beside the pool; all else is the section's defaults."""


def published(**changes):
    """Memory+ in a decoder of 22 layers; a width and feed-forward of usual sizes."""
    model = {
        "vocab_size": 128_256, "hidden_size": 1024, "num_layers": 22, "intermediate_size": 2816,
        "attention": {"kind": "gqa", "num_heads": 16, "num_kv_heads": 16}, NAME: PUBLISHED,
    }  # fmt: skip
    return parse_config(small_config(model=model, data__sequence_length=4096, **changes))


def test_counts_of_the_published_size():
    """The pool is counted once, however many layers share it."""
    config = published()
    assert (config.model.product_key_memory.num_keys, config.model.product_key_memory.key_dim) == (1024, 512)
    counts = count_parameters(config.model.shape)
    hidden, queries = 1024, 4 * 512
    pool = 1024**2 * hidden
    in_layer = hidden * queries + queries + 4 * 2 * 1024 * 256 + 2 * hidden**2
    assert counts.components[f"{NAME}_table"] == counts.tables == pool == 1_073_741_824
    assert counts.components[NAME] == 3 * in_layer
    plain = count_parameters(published(**{f"model__{NAME}": None}).model.shape)
    feed_forward = 3 * hidden * 2816
    assert counts.total == plain.total + pool + 3 * (in_layer - feed_forward)
    assert counts.active == plain.active + 3 * (in_layer - feed_forward + 4 * 32 * hidden)
    with_memory, without = (set(counts.layers), set(plain.layers))
    assert with_memory - without == {counts.layers[4]}
    assert counts.layers[4] == plain.layers[4] + in_layer - feed_forward + 4 * 32 * hidden


def test_a_dry_run_counts_the_copy_of_every_stage(capsys):
    """One copy for each stage with a layer, divided over its ranks."""
    config = published(parallel__pipeline=4)
    stages = rank_bytes(config, Mesh(0, 4, 2, 1))
    tables = [table for stage in stages for table in stage.tables]
    assert len(tables) == sum(any(table.kind == NAME for table in stage.tables) for stage in stages) == 3
    assert [table.number for table in tables] == [4, 12, 20]
    for table in tables:
        assert (table.rows, table.row_bytes) == (1024**2 // 2, 4 * 1024)
        assert table.store == "device"
    for stage in stages:
        assert stage.total == stage.weights + stage.gradients + stage.optimizer + stage.activations + sum(
            table.bytes + table.working_set for table in stage.tables
        )
    counts = count_parameters(config.model.shape)
    assert sum(stage.parameters for stage in stages) == counts.total - counts.tables
    (whole,) = rank_bytes(published(), Mesh(0, 1, 1, 1))
    assert [table.number for table in whole.tables] == [4]
    assert print_dry_run(config, 8, as_json=False) == 0
    assert f"{NAME} tables" in capsys.readouterr().out


def sets_case(config):
    """(most bytes that the look-ups of a step have held, bytes of sums at its end, bytes of the store)."""
    from kmem.parallel.product_key_memory_kind import StagePool

    pipeline, held, sums = build(config), [], []
    (pool,) = pipeline.context.memories
    if not pool.layers:
        train_step(pipeline, 0)
        return pipeline.close()
    add, commit = StagePool._add_gradient, pipeline.stage_tables.commit

    def noted(pool, layer, name):
        sets = pipeline.context.working_sets.values()
        index = sum(part.nbytes for working_set in sets for part in working_set.index)
        rows = sum(part.nbytes for one in sets for part in (one.rows, one.gradient) if part is not None)
        held.append((rows, index, len(sets)))
        add(pool, layer, name)

    def counted(*arguments):
        assert not pipeline.context.working_sets
        sums.append(sum(part.nbytes for both in pool._sums.values() for part in both))
        commit(*arguments)

    StagePool._add_gradient, pipeline.stage_tables.commit = noted, counted
    try:
        train_step(pipeline, 0)
    finally:
        StagePool._add_gradient = add
    stored = pipeline.stage_tables.tables[TABLE].store.bytes
    pipeline.close()
    return max(held), sums, stored


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("stages", [1, 2])
def test_a_dry_run_bounds_what_a_step_holds(ranks, stages, recompute):
    """Every layer keeps the rows of the micro-batches in flight. (A pool of so few rows is read almost whole.)"""
    layers = [1, 3] if stages == 1 else [0, 1]
    changes = {
        f"model__{NAME}__num_keys": 5,
        f"model__{NAME}__layers": layers,
        "train__recompute": recompute,
    }
    config = tree(**changes, parallel__pipeline=stages)
    (rows, index, number), (sums,), stored = ranks.run(stages, sets_case, config)[0]
    assert number == stages * 2
    ((table,),) = [stage.tables for stage in rank_bytes(parse_config(config), Mesh(0, stages, 1, 1)) if stage.tables]
    row = 32 * 4
    assert table.working_set - (number + 1) * 25 * row == index
    assert 0.8 * (table.working_set - index) < rows <= table.working_set - index
    assert 0.9 * table.host_buffers < sums <= table.host_buffers
    assert 0 <= stored - table.bytes < 5 * 4096


# Configuration


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"key_dim": 15}, rf"model\.{NAME}.*\bkey_dim=15\b"),
        ({"key_dim": 0}, rf"model\.{NAME}\.key_dim\b"),
        ({"top_k": 21}, rf"model\.{NAME}.*\btop_k=21 .*\bnum_keys=20\b"),
        ({"top_k": 0}, rf"model\.{NAME}\.top_k\b"),
        ({"num_keys": 0}, rf"model\.{NAME}\.num_keys\b"),
        ({"heads": 0}, rf"model\.{NAME}\.heads\b"),
        ({"layers": []}, rf"model\.{NAME}\.layers\b"),
        ({"layers": [1, 1]}, rf"model\.{NAME}.*\blayers=\[1, 1\]"),
        ({"layers": [4]}, rf"{NAME}\.layers=\[4\] .*\bnum_layers=4\b"),
        ({"layers": [-1]}, rf"model\.{NAME}\.layers\b"),
        ({"keys": 5}, rf"model\.{NAME}\.keys\b"),
    ],
)
def test_wrong_sections_are_refused(changes, named):
    assert_matches(named, wrong(CASE, {f"model__{NAME}": {**SECTION, **changes}}))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({f"{NAME}__prefetch_depth": 1}, rf"\b{NAME}\.prefetch_depth\b"),
        ({f"{NAME}__staleness": 1}, rf"\b{NAME}\b.*\bstaleness\b"),
        ({f"{NAME}__store": "disk"}, rf"\b{NAME}\.store\b"),
        (
            {"model__per_layer_embeddings": {"form": "stem", "layers": [3]}},
            rf"\b{NAME}\b.*\bper_layer_embeddings\b.*\blayer 3\b",
        ),
    ],
)
def test_wrong_runs_are_refused(changes, named):
    assert_matches(named, wrong(CASE, changes))


def assert_matches(named, message):
    with pytest.raises(ValueError, match=f"(?s){named}"):
        raise ValueError(message)


def test_defaults_are_the_papers():
    section = parse_config(CASE.config(**{f"model__{NAME}": {"layers": [1]}, "model__num_layers": 4}))
    found = section.model.product_key_memory
    assert (found.num_keys, found.key_dim, found.heads, found.top_k, found.qk_norm) == (1024, 512, 4, 32, False)
    assert (section.product_key_memory.store, section.prefetch_depth) == ("device", 0)
