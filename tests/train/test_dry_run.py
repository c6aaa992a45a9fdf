"""Stages and memory of a dry run."""

from itertools import pairwise

import pytest

from kmem.config import parse_config
from kmem.model.engram_reader import table_name
from kmem.model.parameter_counts import count_parameters
from kmem.parallel.layer_work import layer_work
from kmem.parallel.mesh import Mesh
from kmem.parallel.stages import stage_bounds
from kmem.tables.table import Table
from kmem.tables.table_spec import TableSpec
from kmem.tables.worker import TableWorker
from kmem.train.dry_run import print_dry_run, rank_bytes
from tests.distributed.training_case import build, small_config
from tests.tables.toy import opened


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 6])
def test_stages_cover_the_layers_and_none_is_empty(stages):
    config = parse_config(small_config(parallel__pipeline=stages))
    bounds = stage_bounds(config)
    assert (bounds[0], bounds[-1], len(bounds)) == (0, config.model.num_layers + 2, stages + 1)
    assert all(a < b for a, b in pairwise(bounds))


def test_the_heaviest_stage_is_as_light_as_it_can_be():
    """Against all ways to cut the layers in three."""
    config = parse_config(small_config(parallel__pipeline=3))
    counts = count_parameters(config.model.shape)
    weights = [0, *counts.layers, counts.head]
    bounds = stage_bounds(config)

    def heaviest(a, b):
        return max(sum(weights[:a]), sum(weights[a:b]), sum(weights[b:]))

    best = min(heaviest(a, b) for a in range(1, 5) for b in range(a + 1, 6))
    assert heaviest(bounds[1], bounds[2]) == best


BANK = {"model__bank": {"children": 3, "levels": [2, 0, 1]}, "data__addresses": {"tree": "none"}}
ENGRAM = {"layers": [0, 2], "heads": 2, "rows_per_head": 100, "row_dim": 8, "compression": False}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model__tie_embeddings": True},
        {"model__engram": ENGRAM, "model__hyper_connections": {"branches": 2}},
        {**BANK, "model__bank__placement": "last", "model__bank__placed_layers": 2},
    ],
    ids=["untied", "tied", "engram", "bank"],
)
def test_parameters_and_tables_per_rank_are_those_of_the_built_pipeline(ranks, changes):
    tree = small_config(parallel={"pipeline": 2, "expert": 2}, **changes)
    planned = rank_bytes(parse_config(tree), Mesh(0, 2, 2, 2))
    built = ranks.run(4, built_case, tree)
    for rank, (parameters, rows) in enumerate(built):
        stage = planned[rank // 2]
        assert parameters == stage.parameters
        assert len(rows) == len(stage.tables)
        first = rank % 2 == 0  # the rank whose rows are planned; the other may have one fewer
        for table in stage.tables:
            prefix = table_name(table.number) if table.kind == "engram" else f"bank.level{table.number}.layers-"
            (found,) = (count for name, count in rows.items() if name.startswith(prefix))
            assert table.rows - found in ((0,) if first else (0, 1))


def built_case(tree):
    """Elements of the parameters this rank holds, and its rows of each table by name."""
    pipeline = build(tree)
    tables = pipeline.stage_tables.tables
    rows = {name: len(table.local) for name, table in tables.items()}
    pipeline.close()
    return sum(parameter.numel() for parameter in pipeline.module.parameters()), rows


def with_engram(memory, **changes):
    return parse_config(small_config(model__engram=ENGRAM, engram=memory, **changes))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", ["lazy_adam", "adam_catchup", "rowwise_adagrad", "sinkhorn_momentum"])
def test_table_bytes_are_those_of_the_built_table(optimizer, dtype):
    config = with_engram({"dtype": dtype, "optimizer": {"name": optimizer}})
    (stage,) = rank_bytes(config, Mesh(0, 1, 1, 1))
    assert len(stage.tables) == 2
    for planned in stage.tables:
        worker = TableWorker()
        with opened(Table(TableSpec("table", planned.rows, 8, dtype), config.engram.optimizer, worker)) as table:
            assert planned.bytes == sum(array.nbytes for array in table.store.arrays.values())
        worker.close()


@pytest.mark.parametrize("optimizer", ["lazy_adam", "adam_catchup", "rowwise_adagrad", "sinkhorn_momentum"])
@pytest.mark.parametrize("row_dim", [8, 256])
def test_table_bytes_are_those_of_the_mapped_file(optimizer, row_dim, tmp_path):
    memory = {"store": "mmap", "optimizer": {"name": optimizer, "dense": False}}
    config = parse_config(small_config(model__engram=ENGRAM | {"row_dim": row_dim}, engram=memory))
    planned = rank_bytes(config, Mesh(0, 1, 1, 1))[0].tables[0]
    worker = TableWorker()
    spec = TableSpec("table", planned.rows, row_dim, store="mmap", folder=tmp_path)
    with opened(Table(spec, config.engram.optimizer, worker)) as table:
        assert 0 <= table.store.bytes - planned.bytes < 4096
    worker.close()


def test_rows_are_divided_over_the_ranks_of_the_stage_that_owns_the_layer():
    config = with_engram({}, parallel__pipeline=2)
    stages = rank_bytes(config, Mesh(0, 2, 4, 1))
    bounds = stage_bounds(config)
    whole = rank_bytes(config, Mesh(0, 2, 1, 1))
    for number, (stage, alone) in enumerate(zip(stages, whole, strict=True)):
        assert all(bounds[number] <= table.number + 1 < bounds[number + 1] for table in stage.tables)
        assert [table.rows for table in stage.tables] == [-(-table.rows // 4) for table in alone.tables]
    assert [table.number for stage in stages for table in stage.tables] == [0, 2]
    assert sum(t.rows for stage in whole for t in stage.tables) * 8 == count_parameters(config.model.shape).tables
    counts = count_parameters(config.model.shape)
    assert sum(stage.parameters for stage in whole) == counts.total - counts.tables


def test_a_step_uses_no_more_rows_than_it_looks_up_nor_than_there_are():
    """Rows and gradients in fp32 and an index of 8 bytes; prefetched steps keep their rows as stored."""
    few = with_engram({"dtype": "bf16", "prefetch_depth": 3})
    look_ups = few.train.global_batch_size * few.data.sequence_length * 4
    (stage,) = rank_bytes(few, Mesh(0, 1, 1, 1))
    for table in stage.tables:
        unique = min(look_ups, table.rows)
        assert unique < look_ups
        assert table.working_set == unique * 8 * 4 * 2 + look_ups * 8
        assert table.host_buffers == 3 * (unique * 8 * 2 + look_ups * 8)
    many = parse_config(small_config(model__engram=ENGRAM | {"rows_per_head": 10**7}))
    assert {table.working_set for table in rank_bytes(many, Mesh(0, 1, 1, 1))[0].tables} == {look_ups * (8 * 8 + 8)}


def test_only_tables_on_the_device_count_as_its_memory():
    totals = {
        store: rank_bytes(with_engram({"store": store}), Mesh(0, 1, 1, 1))[0] for store in ("device", "host", "mmap")
    }
    tables = sum(table.bytes for table in totals["device"].tables)
    assert totals["device"].total - totals["host"].total == tables > 0
    assert totals["mmap"].total == totals["host"].total


def test_recomputation_leaves_the_inputs_of_layers():
    """Stages have as many micro-batches in flight as there are stages after them, and one layer in work."""

    def activations(recompute, **changes):
        config = parse_config(small_config(train__recompute=recompute, parallel__pipeline=2, **changes))
        return [stage.activations for stage in rank_bytes(config, Mesh(0, 2, 1, 1))]

    none, selective, full = (activations(kind) for kind in ("none", "selective", "full"))
    assert none[0] > selective[0] > full[0]
    config = parse_config(small_config(train__recompute="full"))
    works = [layer_work(config, index) for index in range(config.model.num_layers)]
    assert {work.kept for work in works} == {2 * 16 * config.model.hidden_size * 4}
    assert full[0] == 2 * sum(work.kept for work in works[:2]) + max(work.extra for work in works[:2])


def test_all_memories_at_once():
    """A bank of the attention lives in layers whose feed-forward another memory replaces."""
    changes = {
        "model__engram": ENGRAM,
        "model__bank": {"children": 2, "levels": [2], "kind": "kv"},
        "data__addresses": {"tree": "none"},
        "model__over_encoding": {"rows": 61},
        "model__per_layer_embeddings": {"width": 8},
        "model__product_key_memory": {"layers": [0], "num_keys": 8, "key_dim": 16, "top_k": 2},
        "model__hyper_connections": {"branches": 2},
    }
    (stage,) = rank_bytes(parse_config(small_config(**changes)), Mesh(0, 1, 1, 1))
    assert {table.kind for table in stage.tables} == {name.removeprefix("model__") for name in changes} - {
        "data__addresses",
        "hyper_connections",
    }
    assert stage.activations > 0


def test_a_table_beyond_any_machine_is_only_counted(capsys):
    huge = ENGRAM | {"rows_per_head": 10**12, "heads": 1, "layers": [0]}
    assert print_dry_run(parse_config(small_config(model__engram=huge)), 2, as_json=False) == 0
    printed = capsys.readouterr().out
    assert "tables per rank" in printed
    assert "TiB" in printed


def test_a_bank_is_divided_over_stages_by_columns_and_over_ranks_by_rows():
    config = parse_config(small_config(**BANK, parallel__pipeline=2))
    whole, stages = (rank_bytes(config, Mesh(0, 2, data, 1)) for data in (1, 2))
    counts = count_parameters(config.model.shape)
    rows = {1: 3, 3: 27}
    assert [table.number for stage in whole for table in stage.tables] == [1, 3, 1, 3]
    assert all(table.rows == rows[table.number] for stage in whole for table in stage.tables)
    assert all(table.rows == -(-rows[table.number] // 2) for stage in stages for table in stage.tables)
    values = sum(table.rows * table.row_bytes // 4 for stage in whole for table in stage.tables)
    assert values == counts.components["bank"] == counts.tables == counts.components["bank"]
    assert counts.total == sum(counts.components.values()) == counts.anchor + counts.components["bank"]
    assert sum(stage.parameters for stage in whole) == counts.anchor
    plain = count_parameters(parse_config(small_config()).model.shape)
    assert counts.active - plain.active == sum(counts.layers) - sum(plain.layers) == counts.fetched


def test_a_step_fetches_a_block_for_each_sequence_of_one_leaf():
    def unique(batching):
        data = {"data__addresses": {"tree": "none", "batching": batching}, "train__global_batch_size": 8}
        (stage,) = rank_bytes(parse_config(small_config(**{**BANK, **data})), Mesh(0, 1, 1, 1))
        return [table.working_set // (2 * table.row_bytes) for table in stage.tables]

    assert unique("leaf") == [3, 8]
    assert unique("packed") == [3, 27]


def test_a_frozen_anchor_needs_weights_only():
    frozen = {**BANK, "model__bank__anchor": "frozen"}
    (stage,) = rank_bytes(parse_config(small_config(**frozen)), Mesh(0, 1, 1, 1))
    assert (stage.gradients, stage.optimizer, stage.weights) == (0, 0, 4 * stage.parameters)


def test_tables_of_both_memories_are_shown(capsys):
    assert print_dry_run(parse_config(small_config(**BANK, model__engram=ENGRAM)), 2, as_json=False) == 0
    printed = capsys.readouterr().out
    assert "engram tables" in printed
    assert "bank tables" in printed
    assert "fetched" in printed


def test_text_of_subtrees_fetches_their_blocks_and_those_above():
    chosen = {"data__addresses__batching": "leaf", "data__addresses__subtrees": ["0", "1.2"]}
    config = parse_config(small_config(**BANK, **chosen, train__global_batch_size=1000))
    counts = count_parameters(config.model.shape)
    (stage,) = rank_bytes(config, Mesh(0, 1, 1, 1))
    rows = {table.number: table.working_set // (2 * table.row_bytes) for table in stage.tables}
    assert rows == {1: 2, 3: 9 + 3}
    assert [table.rows for table in stage.tables] == [3, 27]
    assert sum(table.rows * table.row_bytes // 4 for table in stage.tables) == counts.components["bank"]
    config = parse_config(small_config(**BANK, **chosen, train__global_batch_size=1000, bank__hold="subtrees"))
    (stage,) = rank_bytes(config, Mesh(0, 1, 1, 1))
    assert {table.number: table.rows for table in stage.tables} == rows


def shown(capsys, **changes):
    """What the table of parameters has, name -> count, and the rest of what is printed."""
    assert print_dry_run(parse_config(small_config(**changes)), 1, as_json=False) == 0
    printed = capsys.readouterr().out
    table, rest = printed[printed.index("┏") :].split("└", 1)
    rows = [line.split("│") for line in table.splitlines() if line.startswith("│")]
    return {name.strip(): int(count.replace(",", "")) for _, name, count, _ in rows}, printed[
        : printed.index("┏")
    ] + rest


@pytest.mark.parametrize("generic", [0.0, 0.1])
def test_people_are_shown_what_is_there_once(capsys, generic):
    dense, printed = shown(capsys, model__moe=None)
    assert {"routed_experts", "routers", "shared_experts", "tables"}.isdisjoint(dense)
    assert all(dense.values())
    assert f"case: {dense['total'] / 1000:.4g}K parameters" in printed
    assert "= 1 rank " in printed
    bank, _ = shown(capsys, **BANK, model__bank__generic={"probability": generic})
    assert ("tables" in bank) == ("generic" in bank) == bool(generic), "the sum is shown where it is one"
    assert bank["total"] == bank["anchor"] + bank["bank"] + bank.get("generic", 0)
    both, _ = shown(capsys, **BANK, model__engram=ENGRAM)
    assert both["tables"] == both["engram_table"] + both["bank"]
