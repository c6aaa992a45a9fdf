"""Prefetch changes nothing, and the tests would see it if it did."""

import contextlib

import numpy as np
import pytest
import torch

from kmem.config import RowOptimizerConfig
from kmem.tables.counter_random import key, normal_rows
from kmem.tables.table import Table
from kmem.tables.table_spec import TableSpec
from tests.tables.toy import (
    DIM,
    LENGTH,
    MICRO_BATCHES,
    ROWS,
    SEQUENCES,
    SPEC,
    AllFresh,
    AskerDecides,
    K,
    backbone,
    case,
    loss_of,
    mapped,
    opened,
    rank_ids,
    start_worker,
    step_ids,
    targets,
)

STEPS = 30


def equal(one, two) -> bool:
    """Bitwise, over all ranks: losses, rows and state."""
    return all(
        a.losses == b.losses
        and torch.equal(a.rows, b.rows)
        and all(torch.equal(a.state[name], b.state[name]) for name in a.state)
        for a, b in zip(one, two, strict=True)
    )


def by_run(results):
    """Results by rank and run -> by run and rank."""
    return list(zip(*results, strict=True))


@pytest.mark.parametrize("world", [1, 2, pytest.param(4, marks=pytest.mark.full)])
def test_prefetch_is_exact_and_the_controls_are_not(ranks, world):
    arguments = [
        {"prefetch": 0},
        {"prefetch": 1},
        {"prefetch": 3},
        {"prefetch": 1, "evaluate_every": 5},
        {"prefetch": 1, "kind": AllFresh},
        {"prefetch": 1, "kind": AskerDecides},
        {"prefetch": 1, "staleness": 1},
        {"prefetch": 2, "staleness": 1},
    ]
    off, on, deep, evaluated, all_fresh, asker, stale, deeper = by_run(
        ranks.run(world, case, world, [{"steps": STEPS, **each} for each in arguments])
    )
    assert equal(off, on)
    assert equal(off, deep)
    assert equal(off, evaluated)
    assert not equal(off, all_fresh)
    assert equal(off, asker) == (world == 1)
    assert not equal(off, stale)
    assert equal(stale, all_fresh)  # one step ahead and one uncommitted step allowed: nothing ever waits
    assert equal(stale, deeper)  # what a step sees is a function of the staleness, not of the depth
    assert all(metrics.conflict_rows > 0 for rank in on for metrics in rank.metrics[1:])
    assert all(metrics.conflict_rows == 0 for rank in off for metrics in rank.metrics)
    for run in (off, on, deep):
        assert all(m.addresses == SEQUENCES // world * LENGTH * K for rank in run for m in rank.metrics)
        assert all(m.dedup_ratio > 1 for rank in run for m in rank.metrics)
        assert all((m.bytes > 0) == (world > 1) for rank in run for m in rank.metrics)


@pytest.mark.parametrize(
    "optimizer",
    [
        RowOptimizerConfig(name="adam_catchup", weight_decay=0.01, clip_norm=0.1),
        RowOptimizerConfig(name="rowwise_adagrad"),
        RowOptimizerConfig(name="sinkhorn_momentum", dense=False),
        RowOptimizerConfig(name="lazy_adam", stochastic_rounding=True),
    ],
    ids=lambda settings: settings.name,
)
def test_prefetch_is_exact_for_every_lazy_optimizer_and_bf16(ranks, tmp_path, optimizer):
    dtype = "bf16" if optimizer.stochastic_rounding else "fp32"
    spec = TableSpec("toy.memory", ROWS, DIM, dtype, "mmap", tmp_path, init_std=0.5)
    common = {"steps": 20, "spec": spec, "optimizer": optimizer, "skip": (3, 4, 9)}
    off, on = by_run(ranks.run(2, case, 2, [{"prefetch": 0, **common}, {"prefetch": 2, **common}]))
    assert equal(off, on)
    assert not list(tmp_path.iterdir())


def reference(steps):
    """One process, the full table as a dense embedding with a sparse gradient."""
    table = torch.nn.Embedding(ROWS, DIM, sparse=True)
    stream = key(SPEC.seed, SPEC.name)
    table.weight.data = torch.from_numpy(normal_rows(0, ROWS, DIM, stream, SPEC.init_std))
    optimizer, weight = torch.optim.SparseAdam(table.parameters(), lr=0.05), backbone()
    losses, gradients, tables = [], [], []
    for step in range(steps):
        loss = loss_of(table(step_ids(step)), weight, targets(step))
        loss.backward()
        gradients.append(table.weight.grad.to_dense())
        optimizer.step()
        with torch.no_grad():
            weight -= 0.1 * weight.grad
        weight.grad = table.weight.grad = None
        losses.append(loss.item())
        tables.append(table.weight.detach().clone())
    return losses, gradients, tables


@pytest.mark.parametrize("world", [1, 2, 4])
def test_shards_are_the_full_table(ranks, world):
    losses, gradients, tables = reference(30)
    ((*runs,), (*first,)) = by_run(ranks.run(world, case, world, [{"steps": 30}, {"steps": 1}]))
    start = torch.from_numpy(normal_rows(0, ROWS, DIM, key(SPEC.seed, SPEC.name), SPEC.init_std))
    for rank, run in enumerate(runs):
        share = SEQUENCES // world
        ids = step_ids(0)[rank * share : (rank + 1) * share].view(MICRO_BATCHES, -1, LENGTH, K)
        assert torch.equal(torch.stack(run.lookups), start[ids])
    gradient = np.zeros((ROWS, DIM), np.float32)
    for run in first:
        rows, values = run.updates[0]
        gradient[rows] += values
    assert (torch.from_numpy(gradient) - gradients[0]).abs().max() < 1e-6
    assert (torch.cat([run.rows for run in first]) - tables[0]).abs().max() < 1e-6
    assert max(abs(a - b) for a, b in zip(runs[0].losses, losses, strict=True)) < 1e-6
    assert (torch.cat([run.rows for run in runs]) - tables[-1]).abs().max() < 1e-5


@pytest.mark.parametrize("world", [1, 2])
def test_prefetch_is_exact_where_every_row_moves(ranks, world):
    """A commit of the dense form changes rows that no step holds, so no row may go out before it."""
    common = {"steps": 20, "optimizer": RowOptimizerConfig(name="sinkhorn_momentum")}
    off, one, deep, all_fresh = by_run(
        ranks.run(
            world,
            case,
            world,
            [*({"prefetch": depth, **common} for depth in (0, 1, 3)), {"prefetch": 1, "kind": AllFresh, **common}],
        )
    )
    assert equal(off, one)
    assert equal(off, deep)
    assert not equal(off, all_fresh)


@pytest.mark.parametrize("world", [2, 4])
def test_dense_sinkhorn_is_sharded_exactly_enough(ranks, world):
    """Column statistics are summed over ranks: any number of them moves every row as one does."""
    arguments = [{"steps": 10, "optimizer": RowOptimizerConfig(name="sinkhorn_momentum")}]
    one = ranks.run(1, case, 1, arguments)
    many = ranks.run(world, case, world, arguments)
    difference = torch.cat([rank[0].rows for rank in many]) - one[0][0].rows
    assert difference.abs().max() < 1e-5


def test_all_stores_train_alike(tmp_path):
    specs = [SPEC, TableSpec("toy.memory", ROWS, DIM, store="device", init_std=0.5), mapped(tmp_path)]
    (runs,) = [case(1, [{"steps": 10, "spec": spec} for spec in specs])]
    assert equal([runs[0]], [runs[1]])
    assert equal([runs[0]], [runs[2]])


def test_a_skipped_step_is_as_if_it_had_not_been():
    skipped, plain = case(1, [{"steps": 4, "skip": (3,)}, {"steps": 3}])
    assert torch.equal(skipped.rows, plain.rows)
    assert torch.equal(skipped.state["first_moment"], plain.state["first_moment"])


def two_tables(world, prefetch):
    """Tables of two layers on one worker, as a stage with several memory layers has them."""
    worker = start_worker(world)
    rank = worker.exchange.rank
    specs = [SPEC, TableSpec("toy.other", ROWS - 10, DIM, "bf16", init_std=0.5)]
    with contextlib.ExitStack() as stack:
        tables = [stack.enter_context(opened(Table(spec, RowOptimizerConfig(), worker))) for spec in specs]

        def begin(step):
            return [table.begin(rank_ids(step, rank, world) % table.spec.rows) for table in tables]

        tickets = begin(0)
        for step in range(20):
            working_sets = [ticket.result() for ticket in tickets]
            following = begin(step + 1) if prefetch else None
            for micro in range(MICRO_BATCHES):
                one, other = (working_set.lookup(micro) for working_set in working_sets)
                (one * other).sum().backward()
            for ticket in tickets:
                ticket.commit(1 / world, 0.05)
            tickets = following or begin(step + 1)
        rows = [table.read_rows(table.local.start, table.local.stop) for table in tables]
    worker.close()
    return rows


@pytest.mark.parametrize("world", [1, 2])
def test_tables_of_several_layers_share_a_worker(ranks, world):
    off, on = (ranks.run(world, two_tables, world, prefetch) for prefetch in (False, True))
    assert all(torch.equal(a, b) for one, two in zip(off, on, strict=True) for a, b in zip(one, two, strict=True))
