"""Tables that layers look up in the forward pass, on the main thread."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from kmem.config import RowOptimizerConfig, UserError
from kmem.tables import working_set as working_sets
from kmem.tables.exchange import Exchange, join_groups
from kmem.tables.row_optimizers.update import sum_by_row
from kmem.tables.table import Table
from kmem.tables.table_spec import TableSpec
from kmem.tables.worker import InlineWorker, TableWorker
from kmem.tables.working_set import StepPlan, WorkingSet
from tests.tables.toy import DIM, ROWS, SPEC, assert_nothing_is_left, committed_or_skipped, opened

N, HEADS, K = 11, 2, 3


def random(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


# Weighted sums of rows


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("tokens_at_once", [1, 4, N])
def test_weighted_sums_are_those_of_an_embedding_bag(tokens_at_once, recompute, monkeypatch):
    """Two look-ups of one working set; rows repeat within a token and over tokens."""
    monkeypatch.setattr(working_sets, "CHUNK_BYTES", tokens_at_once * 8 * DIM * HEADS * K + 1)
    ids = torch.randint(9, (2, N, HEADS, K), generator=torch.Generator().manual_seed(1))
    ids[:, 0] = 5
    plan = StepPlan.of(ids)
    rows = random(len(plan.rows), DIM)
    working_set, table = WorkingSet(rows.clone(), plan.index), rows.clone().requires_grad_()
    for micro in range(2):
        weights, twin = (random(N, HEADS, K, seed=micro).requires_grad_() for _ in range(2))

        def readout(micro=micro, weights=weights):
            return (working_set.weighted(micro, weights) ** 3).sum()

        (checkpoint(readout, use_reentrant=False) if recompute else readout()).backward()
        index = plan.index[micro].flatten(1)
        bags = F.embedding_bag(index, table, per_sample_weights=twin.flatten(1), mode="sum")
        assert torch.equal(working_set.weighted(micro, weights), bags)
        assert bags.shape == (N, DIM)
        (bags**3).sum().backward()
        torch.testing.assert_close(weights.grad, twin.grad)
    torch.testing.assert_close(working_set.gradient, table.grad)
    assert working_set.rows.grad is None


def test_gradients_of_tokens_are_added_in_their_order_however_many_at_once(monkeypatch):
    ids = torch.randint(9, (1, N, HEADS, K), generator=torch.Generator().manual_seed(1))
    plan, found = StepPlan.of(ids), []
    for tokens in (1, 4, N):
        monkeypatch.setattr(working_sets, "CHUNK_BYTES", tokens * 8 * DIM * HEADS * K)
        working_set = WorkingSet(random(len(plan.rows), DIM), plan.index)
        weights = random(N, HEADS, K).requires_grad_()
        (working_set.weighted(0, weights) ** 3).sum().backward()
        found.append((working_set.gradient, weights.grad))
    assert all(torch.equal(gradient, found[0][0]) and torch.equal(grad, found[0][1]) for gradient, grad in found)


def test_frozen_rows_collect_nothing_but_weights_learn():
    plan = StepPlan.of(torch.arange(N * K).view(1, N, 1, K) % 7)
    frozen = WorkingSet(random(7, DIM), plan.index, trainable=False)
    weights = random(N, 1, K).requires_grad_()
    frozen.weighted(0, weights).sum().backward()
    assert frozen.gradient is None
    torch.testing.assert_close(weights.grad, frozen.rows[plan.index[0]].sum(-1))
    with torch.no_grad():
        assert not frozen.weighted(0, weights).requires_grad


def test_a_row_gradient_that_is_not_finite_is_seen():
    plan = StepPlan.of(torch.arange(N * K).view(1, N, 1, K) % 7)
    working_set = WorkingSet(random(7, DIM), plan.index)
    (working_set.weighted(0, torch.ones(N, 1, K, requires_grad=True)) * float("nan")).sum().backward()
    assert not working_set.finite()


# Sums by row


@pytest.mark.parametrize("count", [0, 1, 40])
def test_sums_by_row_are_in_the_order_of_the_entries(count):
    rows = np.random.default_rng(0).integers(0, 9, count) * 10**12
    gradients = random(count, 3).numpy() * np.float32(1e4)
    distinct, sums = sum_by_row(rows, gradients)
    assert distinct.tolist() == sorted(set(rows.tolist()))
    assert sums.dtype == np.float32
    for row, found in zip(distinct, sums, strict=True):
        expected = np.zeros(3, np.float32)
        for gradient in gradients[rows == row]:
            expected += gradient
        assert np.array_equal(found, expected)


def test_columns_of_a_wider_array_are_summed_too():
    wide = random(6, 8).numpy()
    rows = np.array([2, 0, 2, 2, 0, 1])
    for found, expected in zip(sum_by_row(rows, wide[:, ::2]), sum_by_row(rows, wide[:, ::2].copy()), strict=True):
        assert np.array_equal(found, expected)


# A table whose work is done at once


def inline_table(optimizer=None, spec=SPEC, **options):
    return Table(spec, optimizer, InlineWorker(Exchange(options.pop("group", None))), **options)


OPTIMIZERS = {
    "lazy_adam": RowOptimizerConfig(),
    "adam_catchup": RowOptimizerConfig(name="adam_catchup", weight_decay=0.1),
    "clipped": RowOptimizerConfig(clip_norm=0.5),
    "rowwise_adagrad": RowOptimizerConfig(name="rowwise_adagrad"),
    "sinkhorn_momentum": RowOptimizerConfig(name="sinkhorn_momentum"),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_are_those_of_committed_steps(name):
    """Also where rows are updated in some steps only, and where a row has several gradients, added in order."""
    worker = TableWorker()
    generator = np.random.default_rng(3)
    with opened(Table(SPEC, OPTIMIZERS[name], worker)) as usual, opened(inline_table(OPTIMIZERS[name])) as table:
        for step in range(4):
            looked_up = generator.integers(0, 40, 25)
            gradients = random(25, DIM, seed=step)
            with committed_or_skipped(usual.begin(torch.from_numpy(looked_up).view(1, -1))) as ticket:
                working_set = ticket.result()
                (working_set.lookup(0) * gradients).sum().backward()
                ticket.commit(scale=0.5, learning_rate=0.05)
            found = table.evaluate(torch.from_numpy(looked_up).view(1, -1), trainable=True)
            assert torch.equal(found.rows, working_set.rows)
            assert found.rows.requires_grad
            assert found.asked.tolist() == sorted(set(looked_up.tolist()))
            rows, sums = table.owner_sums(*sum_by_row(looked_up, gradients.numpy()))
            assert np.array_equal(rows, found.asked)
            assert np.array_equal(sums, working_set.gradient.numpy())
            table.update(rows, sums, 0.5, 0.05)
        usual.drain()
        assert int(table._optimizer_step) == int(usual._optimizer_step) == 4
        for array in table.store.arrays:
            assert torch.equal(table.store[array], usual.store[array]), array
        assert torch.equal(table.read_rows(0, ROWS), usual.read_rows(0, ROWS))
    worker.close()


def test_gradients_of_one_row_are_added_in_their_order():
    """As the layers of a pool give them: their sums one after another."""
    parts = [sum_by_row(np.arange(first, first + 20), random(20, DIM, seed=first).numpy()) for first in (0, 10, 15)]
    joined = [np.concatenate(column) for column in zip(*parts, strict=True)]
    whole = sum_by_row(*joined)
    assert len(joined[0]) > len(whole[0])
    tables = [inline_table(RowOptimizerConfig()) for _ in range(2)]
    for table, (rows, gradients) in zip(tables, (joined, whole), strict=True):
        table.update(rows, gradients, 1.0, 0.05)
        assert (table.read_rows(0, ROWS) != inline_table().read_rows(0, ROWS)).any(1).nonzero().max() == 34
    assert torch.equal(*(table.read_rows(0, ROWS) for table in tables))


@pytest.mark.parametrize("store", ["host", "mmap", "device"])
def test_no_row_at_all_is_an_update(store, tmp_path):
    """A rank may own none of the rows that a step looked up."""
    spec = TableSpec("toy.memory", ROWS, DIM, store=store, folder=tmp_path, init_std=0.5)
    with opened(inline_table(RowOptimizerConfig(), spec)) as table:
        before = table.read_rows(0, ROWS)
        table.update(np.zeros(0, np.int64), np.zeros((0, DIM), np.float32), 1.0, 0.1)
        assert torch.equal(table.read_rows(0, ROWS), before)
        assert int(table._optimizer_step) == 1
        assert table.evaluate(torch.zeros(1, 0, dtype=torch.int64), trainable=True).rows.shape == (0, DIM)


def shared_case(folder):
    """Two ranks send gradients to the owners; the update is that of one table that gets them in the order of ranks."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    rank, found = dist.get_rank(), {}
    asked = [np.arange(0, 60, 2), np.arange(30, 97, 3)]
    gradients = [random(len(rows), DIM, seed=number).numpy() for number, rows in enumerate(asked)]
    for store in ("host", "mmap"):
        spec = TableSpec("toy.memory", ROWS, DIM, store=store, folder=folder, init_std=0.5)
        group = join_groups([range(2)], 60.0)
        with opened(inline_table(RowOptimizerConfig(clip_norm=0.1), spec, group=group)) as table:
            rows, sums = table.owner_sums(asked[rank], gradients[rank])
            table.update(rows, sums, 0.5, 0.05)
            read = table.evaluate(torch.from_numpy(asked[rank])[None]).rows
            found[store] = rows + table.local.start, sums, read
    return found


def test_ranks_share_a_table(ranks, tmp_path):
    results = ranks.run(2, shared_case, tmp_path)
    asked = [np.arange(0, 60, 2), np.arange(30, 97, 3)]
    gradients = [random(len(rows), DIM, seed=number).numpy() for number, rows in enumerate(asked)]
    with opened(inline_table(RowOptimizerConfig(clip_norm=0.1))) as table:
        rows, sums = sum_by_row(np.concatenate(asked), np.concatenate(gradients))
        table.update(rows, sums, 0.5, 0.05)
        for store in ("host", "mmap"):
            for place, part in enumerate((rows, sums)):
                assert np.array_equal(np.concatenate([result[store][place] for result in results]), part)
            for rank, result in enumerate(results):
                expected = table.evaluate(torch.from_numpy(asked[rank])[None]).rows
                torch.testing.assert_close(result[store][2], expected)  # the norm is summed in another order


def test_steps_may_also_be_begun(tmp_path):
    """The worker has the interface of the thread, and does its jobs at once."""
    worker = TableWorker()
    with (
        opened(Table(SPEC, RowOptimizerConfig(), worker)) as usual,
        opened(inline_table(RowOptimizerConfig())) as table,
    ):
        for held in (usual, table):
            for _ in range(2):
                with committed_or_skipped(held.begin(torch.arange(20).view(1, -1))) as ticket:
                    ticket.result().lookup(0).square().sum().backward()
                    ticket.commit(1.0, 0.1)
        assert torch.equal(table.read_rows(0, ROWS), usual.read_rows(0, ROWS))
        assert_nothing_is_left(usual)
        assert not table._open
    worker.close()


def test_errors_reach_the_caller_at_once():
    with opened(inline_table(RowOptimizerConfig())) as table:
        far = torch.tensor([[ROWS]])
        for call in (table.evaluate, table.begin):
            with pytest.raises(UserError, match=rf"toy\.memory .*\b{ROWS}\b"):
                call(far)
        table._open.clear()
        worker = table._worker
        worker.fail(ValueError("first"))
        worker.fail(ValueError("second"))
        assert str(worker.error) == "first"


def test_rows_that_a_step_holds_are_not_updated():
    with opened(inline_table(RowOptimizerConfig())) as table:
        ticket = table.begin(torch.arange(5).view(1, -1))
        with pytest.raises(AssertionError, match="in flight"):
            table.update(np.arange(3), np.zeros((3, DIM), np.float32), 1.0, 0.1)
        ticket.commit(0.0, 0.0, skip=True)
        table.update(np.arange(3), np.zeros((3, DIM), np.float32), 1.0, 0.1)
