import pytest
import torch
from torch.utils.checkpoint import checkpoint

from kmem.config import UserError
from kmem.tables.working_set import StepPlan, WorkingSet

M, B, T, K, D = 3, 2, 5, 4, 6


@pytest.fixture
def ids():
    return torch.randint(0, 30, (M, B, T, K), generator=torch.Generator().manual_seed(0)) * 10**12


def test_deduplication_restores_the_ids(ids):
    for plan in (StepPlan.of(ids), StepPlan.of(list(ids))):
        for index, wanted in zip(plan.index, ids, strict=True):
            assert torch.equal(torch.from_numpy(plan.rows)[index], wanted)
        assert (plan.rows[1:] > plan.rows[:-1]).all()
        assert plan.look_ups == ids.numel()
    empty = StepPlan.of(ids[:, :0])
    assert len(empty.rows) == 0
    assert [index.shape for index in empty.index] == [(0, T, K)] * M


def test_micro_batches_may_look_up_different_numbers_of_rows():
    used = [torch.tensor([7, 2]), torch.tensor([], dtype=torch.int64), torch.tensor([[2, 2, 9]])]
    plan = StepPlan.of(used)
    assert plan.rows.tolist() == [2, 7, 9]
    assert [index.tolist() for index in plan.index] == [[1, 0], [], [[0, 0, 2]]]


def test_negative_ids_are_refused(ids):
    with pytest.raises(UserError, match=r"row ids .*-1\b"):
        StepPlan.of(ids - 1)


@pytest.mark.parametrize("recompute", [False, True])
def test_lookups_accumulate_like_an_embedding(ids, recompute):
    plan = StepPlan.of(ids)
    rows = torch.randn(len(plan.rows), D, generator=torch.Generator().manual_seed(1))
    working_set, weight = WorkingSet(rows.clone(), plan.index), rows.clone().requires_grad_()
    for micro in range(M):

        def readout(micro=micro):
            return (working_set.lookup(micro) ** 3).sum()

        (checkpoint(readout, use_reentrant=False) if recompute else readout()).backward()
        (torch.nn.functional.embedding(plan.index[micro], weight) ** 3).sum().backward()
    assert working_set.rows.grad is None
    assert torch.allclose(working_set.gradient, weight.grad, rtol=1e-6)


def test_gradients_are_summed_in_fp32(ids):
    plan = StepPlan.of(ids * 0)
    working_set = WorkingSet(torch.ones(len(plan.rows), D), plan.index)
    for micro in range(M):
        working_set.lookup(micro).bfloat16().sum().backward()
        working_set.lookup(micro).sum().mul(2.0**-12).backward()
    assert torch.equal(working_set.gradient, torch.full((1, D), M * B * T * K * (1 + 2.0**-12)))


def test_evaluation_records_nothing(ids):
    plan = StepPlan.of(ids)
    working_set = WorkingSet(torch.ones(len(plan.rows), D), plan.index, trainable=False)
    assert not working_set.lookup(0).requires_grad


def test_non_finite_gradients_are_seen(ids):
    plan = StepPlan.of(ids)
    working_set = WorkingSet(torch.ones(len(plan.rows), D), plan.index)
    assert working_set.finite()
    working_set.lookup(0).sum().backward()
    assert working_set.finite()
    (working_set.lookup(1) * float("inf")).sum().backward()
    assert not working_set.finite()


@pytest.mark.parametrize("recompute", [False, True])
def test_columns_accumulate_like_slices_of_rows(recompute):
    """Several layers and micro-batches, each with some of the rows, in fp32 also where they compute in bf16."""
    used = [torch.tensor(rows, dtype=torch.int64) for rows in ([0, 3, 4], [1, 3], [])]
    parts = [(0, 2), (2, 5), (5, 6)]
    values = torch.randn(5, D, generator=torch.Generator().manual_seed(1))
    working_set, weight = WorkingSet(values.clone(), used), values.clone().requires_grad_()
    for micro, rows in enumerate(used):

        def readout(micro=micro):
            return sum((working_set.columns(micro, *part).double() ** 3).sum() for part in parts)

        (checkpoint(readout, use_reentrant=False) if recompute else readout()).backward()
        sum((weight[rows][:, start:stop].double() ** 3).sum() for start, stop in parts).backward()
    assert working_set.rows.grad is None
    assert torch.allclose(working_set.gradient, weight.grad, rtol=1e-6)
    assert not working_set.gradient[2].any()
