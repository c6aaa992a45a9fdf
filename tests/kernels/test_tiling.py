"""Programs of the sizes that a GPU gets, interpreted: many of them for a few tokens. Results are the same bits."""

import pytest
import torch

from tests.kernels.devices import random

pytest.importorskip("triton")
from kmem_kernels.permute import triton as permute
from kmem_kernels.route import triton as route
from kmem_kernels.row_gather import triton as row_gather
from kmem_kernels.row_update import triton as row_update
from kmem_kernels.row_update.op import CatchUp, Gradients, OwnSteps
from kmem_kernels.row_update.reference import AdamStep
from kmem_kernels.segment_reduce import triton as segment_reduce
from kmem_kernels.segment_reduce.op import segments_of

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has these sizes in every test")


def routed():
    logits, bias = random(13, 96), random(96, seed=1)
    experts, weights, scores, counts = route.route(logits, bias, 3, "sigmoid", 6, 2, 2, True, 2.0)
    grad = route.route_backward(scores, experts, random(13, 3, seed=2), logits, "softmax", True, 2.0)
    return [experts, weights, scores, counts, grad]


def permuted():
    experts = torch.randint(9, (75, 2), generator=torch.Generator().manual_seed(0))
    order, place = permute.sort_by_expert(experts, 9)
    hidden, weights = random(75, 40), random(75, 2, seed=1)
    rows = permute.scatter(hidden, place, 150)
    out = permute.gather_sum(rows, weights, place)
    return [order, place, rows, out, *permute.combine_backward(out, rows, weights, place)]


def summed():
    ids = torch.arange(600) % 5 * (torch.arange(600) % 3)
    return [segment_reduce.segment_reduce(random(600, 24), *segments_of(ids, 11), None)]


def gathered():
    ids = torch.arange(300) * 7 % 40
    return [row_gather.row_gather(random(40, 44), ids, torch.zeros(300, 44), None)]


def updated():
    state = [random(40, 24), torch.zeros(40, 24), torch.zeros(40, 24), torch.zeros(40, 1, dtype=torch.int32)]
    accumulators, own = torch.zeros(40, 1), OwnSteps(torch.zeros(40, 1, dtype=torch.int32), torch.tensor([0.3, 0.7]))
    order, starts = segments_of(torch.arange(99) * torch.arange(99) % 33, 33)
    present = starts.diff() > 0
    rows, starts = torch.arange(33)[present], torch.cat([starts[:-1][present], starts[-1:]])
    gradients = Gradients(rows, random(99, 24, seed=1), 0.5, order, starts)
    for step in (1, 2):
        scalars = AdamStep.lazy(0.9, 0.999, 1e-8, 0.1, step)
        row_update.adam_(*state[:3], gradients, scalars, CatchUp(state[3], step, torch.full((3, 4), 0.9)), None)
        row_update.adam_(*state[:3], gradients, scalars, None, None, own=own)
        row_update.rowwise_adagrad_(state[0], accumulators, gradients, 0.1, 1e-8, None)
    return [*state, accumulators, own.updates, row_update.square_norms(state[0])]


OPERATIONS = [
    (routed, route),
    (permuted, permute),
    (summed, segment_reduce),
    (gathered, row_gather),
    (updated, row_update),
]


def test_a_row_may_be_wider_than_a_tile(monkeypatch):
    expected = updated()
    monkeypatch.setattr(row_update, "BLOCK_VALUES", 8)
    assert all(torch.equal(one, two) for one, two in zip(updated(), expected, strict=True))


@pytest.mark.parametrize("operation, module", OPERATIONS)
def test_sizes_of_programs_do_not_show(operation, module, monkeypatch):
    wide = operation()
    monkeypatch.setattr(module, "interpreted", lambda: False)
    for found, expected in zip(operation(), wide, strict=True):
        assert torch.equal(found, expected)
