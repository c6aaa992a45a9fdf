"""Memory banks in the pipeline: the loss curve of plain PyTorch on every mesh, whatever is fetched ahead."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from kmem.config import parse_config
from kmem.data.batch import SequenceBatch
from kmem.model.bank_layout import GENERIC, MISSING, BankLayout, layer_bank_name
from kmem.model.decoder import Decoder
from kmem.model.init import initialise_
from kmem.parallel.bank_step import rows_of
from kmem.parallel.bank_usage import BankUsage
from tests.distributed.bank_case import addressed, bank_config
from tests.distributed.training_case import synthetic_sequences, train_case
from tests.model.bank_parameters import BankParameters
from tests.model.dense_mask import document_mask

STEPS = 6
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
KINDS = {
    "lora_ffn": {"model__moe": None, "model__bank__kind": "lora_ffn"},
    "lora_qk": {"model__bank__kind": "lora_qk"},
    "lora_ov": {"model__bank__kind": "lora_ov"},
    "kv": {"model__bank__kind": "kv"},
    "last layer": {"model__bank__placement": "last", "model__bank__placed_layers": 1},
    "adam_catchup": {"bank__optimizer__name": "adam_catchup"},
    "clipped, mapped": {"bank__optimizer__clip_norm": 0.003, "bank__store": "mmap"},
    "frozen anchor": {"model__bank__anchor": "frozen"},
    "frozen anchor, tied": {"model__bank__anchor": "frozen", "model__tie_embeddings": True},
}
LONG = ("lora_ffn", "lora_qk", "lora_ov", "frozen anchor, tied")


@pytest.fixture(scope="module")
def plain():
    return plain_training(bank_config())


SHORT = {*((mesh, "plain") for mesh in MESHES if mesh != "four-stages"), ("pipeline-expert-data", "recompute")}
CASES = [
    # The variants of a mesh that others contain are long cases.
    pytest.param(mesh, variant, marks=() if (mesh, variant) in SHORT else pytest.mark.full)
    for mesh in MESHES
    for variant in VARIANTS
]


@pytest.mark.parametrize(("mesh", "variant"), CASES)
def test_loss_curve_and_tables_equal_plain_pytorch(ranks, plain, mesh, variant):
    world, changes = MESHES[mesh]
    results = ranks.run(world, train_case, bank_config(**changes, **VARIANTS[variant]), STEPS)
    losses, norms, tables = plain
    assert results[0]["losses"] == pytest.approx(losses, abs=1e-6)
    assert results[0]["norms"] == pytest.approx(norms, rel=1e-4)
    assert_close(merged(results), tables)


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.full if kind in LONG else ()) for kind in KINDS])
def test_other_banks_on_two_stages(ranks, tmp_path, kind):
    tree = bank_config(**KINDS[kind], bank__folder=str(tmp_path))
    losses, _, tables = plain_training(tree)
    results = ranks.run(2, train_case, {**tree, "parallel": {"pipeline": 2}}, STEPS)
    assert results[0]["losses"] == pytest.approx(losses, abs=2e-6)
    assert_close(merged(results), tables)


def test_pipeline_depth_prefetch_and_recomputation_are_bitwise(ranks):
    """At equal data parallelism nothing but the place and the time of the work changes."""
    for data, cases in (
        (2, [(1, 0, "none"), (2, 2, "full")]),
        (1, [(1, 0, "none"), (1, 3, "selective"), (2, 2, "none")]),
    ):
        reference = None
        for pipeline, depth, recompute in cases:
            changes = {
                "bank__prefetch_depth": depth,
                "train__recompute": recompute,
                # Stages add up the norm's squares in another order, and ZeRO-1 cuts partitions elsewhere, where
                # the fused AdamW's vectors end and its last elements round otherwise.
                "train__optimizer__clip_norm": None,
                "parallel__zero_stage": 0,
            }
            tree = bank_config(parallel__pipeline=pipeline, **changes)
            results = ranks.run(pipeline * data, train_case, tree, STEPS)
            found = results[0]["losses"], merged(results)
            reference = reference or found
            assert found[0] == reference[0]
            assert all(torch.equal(found[1][name], table) for name, table in reference[1].items())
    without = ranks.run(1, train_case, {**tree, "model": {**tree["model"], "bank": None}, "parallel": {}}, STEPS)
    assert without[0]["losses"][0] == pytest.approx(reference[0][0], abs=1e-6)  # it starts as a no-op
    assert abs(without[0]["losses"][-1] - reference[0][-1]) > 1e-3


@pytest.mark.parametrize("name", ["lazy_adam", pytest.param("adam_catchup", marks=pytest.mark.full)])
def test_blocks_that_no_step_fetches_keep_their_bits(ranks, name):
    tree = bank_config(bank__optimizer__name=name, parallel__pipeline=2)
    results = ranks.run(4, train_case, tree, 1)
    config = parse_config(tree)
    layout = BankLayout.of(config.model.shape)
    samples = list(range(config.train.global_batch_size))
    addresses = addressed(synthetic_sequences(samples), samples).addresses
    found = merged(results)
    for level in layout.levels:
        used = rows_of(layout, addresses, level).unique()
        used = used[used >= 0]
        others = torch.ones(layout.rows(level), dtype=torch.bool).index_fill(0, used, False)
        assert others.any() or level == 1
        first = layout.by_layer(layout.initial_rows(config.train.init_seed, level, 0, layout.rows(level)), level)
        for layer, rows in first.items():
            after = found[layer_bank_name(layer, level)]
            assert torch.equal(after[others], rows[others])
            assert (after[used] != rows[used]).any(dim=1).all()


def test_figures_count_the_clusters_of_the_global_batch(ranks):
    """Each once, whatever the number of stages."""
    for world, mesh in ((1, {}), (4, {"parallel__pipeline": 2})):
        tree = bank_config(**mesh)
        results = ranks.run(world, train_case, tree, 2)
        layout = BankLayout.of(parse_config(tree).model.shape)
        for step, figures in enumerate(results[-1]["bank"]):
            samples = list(range(step * 8, (step + 1) * 8))
            addresses = addressed(synthetic_sequences(samples), samples).addresses
            assert list(figures) == list(layout.levels)
            for level, found in figures.items():
                rows = rows_of(layout, addresses, level)
                assert found.touched_blocks == len(rows[rows >= 0].unique())
                assert found.touch_density == found.touched_blocks / layout.rows(level)
                assert found.touched_blocks <= found.fetched_blocks <= 2 * found.touched_blocks
                assert (found.fetched_blocks == found.touched_blocks) or world == 4
        assert results[0]["bank"][1][1].touched_blocks == results[-1]["bank"][1][1].touched_blocks


def test_tokens_of_clusters_are_counted_without_padding():
    """Sequences of one leaf each, of several leaves, and generic ones; where there is padding it is left out."""
    layout = BankLayout.of(parse_config(bank_config()).model.shape)
    usage = BankUsage(layout, {2: SimpleNamespace(local=range(3))}, first=True)
    ids = torch.zeros(3, 8, dtype=torch.long)
    leaves = torch.tensor([5, GENERIC, MISSING])[:, None].expand(3, 8)
    padding = torch.arange(8) >= torch.tensor([8, 3, 8])[:, None]
    usage.count([SequenceBatch(ids, ids, ids, ids, leaves, padding)])
    mixed = leaves.clone()
    mixed[0, 6:] = 7
    usage.count([SequenceBatch(ids, ids, ids, ids, mixed)])
    found = {place: int(count) for place, count in enumerate(usage.hits) if count}
    assert found == {5: 8 + 6, 7: 2, len(usage.hits) - 1: 3 + 8}


def test_use_of_the_clusters_is_the_same_on_every_mesh(ranks):
    """Tokens of each since the beginning, steps since the last update, and norms of what blocks write."""
    steps, meshes = 4, [(1, {}), (4, {"parallel__pipeline": 2}), (2, {"bank__prefetch_depth": 2})]
    found = [ranks.run(world, train_case, bank_config(**mesh), steps) for world, mesh in meshes]
    layout = BankLayout.of(parse_config(bank_config()).model.shape)
    samples = [list(range(step * 8, (step + 1) * 8)) for step in range(steps)]
    addresses = torch.stack([addressed(synthetic_sequences(some), some).addresses for some in samples])
    tables = merged(found[0])
    for level in layout.levels:
        rows = [rows_of(layout, some, level) for some in addresses]
        last, clusters = {}, layout.clusters(level)
        for step, used in enumerate(rows):
            used = set(used[used >= 0].tolist())
            ages = [step - last[row] for row in used & last.keys()]
            last |= dict.fromkeys(used, step)
            for result in found:
                figures = result[0]["bank"][step][level]
                assert figures.new_blocks == len(used) - len(ages)
                assert figures.age_mean == pytest.approx(sum(ages) / max(1, len(ages)))
                assert figures.age_max == max(ages, default=0)
                assert (figures.hits is None) == (step < steps - 1)
        tokens = torch.bincount(torch.cat([used[(used >= 0) & (used < clusters)] for used in rows]), minlength=clusters)
        differences = (tokens[:, None] - tokens[None, :]).abs().sum() / (2 * clusters * tokens.sum())
        for result in found:
            figures = result[-1]["bank"][-1][level]
            assert figures.hits["gini"] == pytest.approx(float(differences))
            assert figures.hits["largest"] == pytest.approx(float(tokens.max() * clusters / tokens.sum()))
            assert sum(figures.hits["histogram"]) == clusters
            assert figures.hits["histogram"][0] == int((tokens == 0).sum())
            assert figures.write_norms == pytest.approx(found[0][0]["bank"][-1][level].write_norms, rel=1e-4)
        parts = [layout.by_part(tables[layer_bank_name(layer, level)])["down"] for layer in layout.layers]
        norms = torch.stack([part.square().sum((1, 2)) for part in parts]).sum(0).sqrt()
        norms = norms[sorted(used)]
        expected = {"mean": float(norms.mean()), "max": float(norms.max())}
        assert found[0][0]["bank"][-1][level].write_norms == pytest.approx(expected, rel=1e-5)


def test_evaluation_in_between_changes_nothing(ranks):
    tree = bank_config(bank__prefetch_depth=2)
    without, between = (merged(ranks.run(1, train_case, tree, STEPS, every)) for every in (0, 2))
    assert all(torch.equal(between[name], table) for name, table in without.items())


ENGRAM = {"layers": [1], "heads": 2, "rows_per_head": 40, "row_dim": 8, "compression": False, "init_std": 0.3}
BESIDE = {
    "model__engram": ENGRAM,
    "engram__prefetch_depth": 3,
    "engram__optimizer__eps": 1e-5,
    "bank__prefetch_depth": 1,
    "bank__store": "mmap",
}
FIRST = {"model__bank__placement": "first", "model__bank__placed_layers": 1}


@pytest.mark.parametrize(
    "changes",
    [
        {"bank__optimizer__clip_norm": 0.003},
        BESIDE,
        pytest.param({"model__tie_embeddings": True, **FIRST}, marks=pytest.mark.full),
    ],
    ids=["clipped", "beside-ngram-memory", "tied-first"],
)
@pytest.mark.full
def test_other_models_on_the_widest_mesh(ranks, tmp_path, changes):
    tree = bank_config(**changes, bank__folder=str(tmp_path))
    wide = bank_config(**changes, bank__folder=str(tmp_path), parallel__pipeline=2, parallel__expert=2)
    one, four = ranks.run(1, train_case, tree, 5), ranks.run(4, train_case, wide, 5)
    assert four[0]["losses"] == pytest.approx(one[0]["losses"], abs=1e-5)
    assert_close(merged(four), merged(one), 1e-4)
    if "bank__optimizer__clip_norm" in changes:
        loose = ranks.run(1, train_case, bank_config(), 5)
        assert loose[0]["losses"] != pytest.approx(one[0]["losses"], abs=1e-4)


@pytest.mark.full
def test_bf16_trains_close_to_fp32(ranks):
    (fp32,) = ranks.run(1, train_case, bank_config(), STEPS)
    changes = {"train__precision": "bf16", "bank__dtype": "bf16", "parallel__pipeline": 2, "parallel__expert": 2}
    result = ranks.run(4, train_case, bank_config(**changes), STEPS)[0]
    assert result["losses"] == pytest.approx(fp32["losses"], abs=0.1)


def assert_close(found, expected, tolerance=1e-5):
    assert found.keys() == expected.keys()
    for name, table in found.items():
        torch.testing.assert_close(table, expected[name], rtol=0, atol=tolerance)


def merged(results):
    """Whole tables by layer and level, of the ranks' columns and rows."""
    parts = {}
    for result in results:
        for name, (start, rows) in result["blocks"].items():
            parts.setdefault(name, {})[start] = rows
    return {name: torch.cat([rows for _, rows in sorted(by_start.items())]) for name, by_start in parts.items()}


def plain_training(tree):
    """Dense autograd on the whole model, all blocks and the whole batch, AdamW, and lazy Adam written out."""
    config = parse_config(tree)
    shape = config.model.shape
    layout = BankLayout.of(shape)
    model, bank = Decoder(shape), BankParameters(layout)
    initialise_(model, shape, config.train.init_seed)
    bank.initialise_(config.train.init_seed)
    optimizer, block_optimizer = config.train.optimizer, config.bank.optimizer
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    adam = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": optimizer.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.eps,
    )  # fmt: skip
    blocks = {level: BlockAdam(bank.table(level).parts[0], block_optimizer, optimizer.lr) for level in layout.levels}
    batch = config.train.global_batch_size
    losses, norms = [], []
    for step in range(STEPS):
        samples = list(range(step * batch, (step + 1) * batch))
        sequences = addressed(synthetic_sequences(samples), samples)
        generic = sequences.addresses == GENERIC
        leaves = sequences.addresses.masked_fill(generic, MISSING)
        fetched = bank(leaves, generic)
        mask = document_mask(sequences.document_ids)
        hidden = model(
            sequences.input_ids, sequences.position_ids, mask, memories={"bank": fetched.inputs(leaves.shape[1])}
        )
        loss = F.cross_entropy(model.logits(hidden).flatten(0, 1), sequences.labels.flatten())
        for parameter in (*model.parameters(), *bank.parameters()):
            parameter.grad = None
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), optimizer.clip_norm).item())
        if config.model.bank.anchor == "train":
            adam.step()
        for level, ids in layout.row_ids(leaves, generic).items():
            blocks[level].step(ids[ids >= 0].unique())
        losses.append(loss.item())
    tables = {
        layer_bank_name(layer, level): part
        for level in layout.levels
        for layer, part in layout.by_layer(bank.table(level).parts[0].detach(), level).items()
    }
    return losses, norms, tables


class BlockAdam:
    """Adam on the rows that a step fetches, by the formulas; weights decay in these steps. Lazy rows count their own
    steps."""

    def __init__(self, table, settings, rate):
        self.table, self.settings, self.rate = table, settings, rate * settings.lr_multiplier
        self.first, self.second = torch.zeros_like(table), torch.zeros_like(table)
        self.last, self.counts, self.number = torch.zeros(len(table), 1), torch.zeros(len(table), 1), 0

    @torch.no_grad()
    def step(self, rows):
        self.number += 1
        (a, b), gradient = self.settings.betas, self.table.grad[rows]
        if self.settings.clip_norm is not None:
            norm = float(gradient.norm())
            assert norm > self.settings.clip_norm
            gradient = gradient * (self.settings.clip_norm / (norm + 1e-6))
        decay = 1 - self.rate * self.settings.weight_decay
        missed, dense = self.number - 1 - self.last[rows], self.settings.name == "adam_catchup"
        self.last[rows] = self.number
        self.counts[rows] += 1
        number = torch.full_like(missed, self.number)
        if not dense:
            missed, number = torch.zeros_like(missed), self.counts[rows]
        first = self.first[rows] * a**missed * a + gradient * (1 - a)
        second = self.second[rows] * b**missed * b + gradient**2 * (1 - b)
        self.first[rows], self.second[rows] = first, second
        root = (1 - b**number).sqrt()
        below = second.sqrt() / root + self.settings.eps / (1 if dense else root)
        change = self.rate * first / (1 - a**number) / below
        self.table[rows] = self.table[rows] * decay ** (missed + 1) - change
