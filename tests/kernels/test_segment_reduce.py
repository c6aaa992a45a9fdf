"""Sums of segments: exact in their order, whoever computes them and whatever lies beside them."""

import pytest
import torch

from tests.kernels.devices import DEVICES, random

pytest.importorskip("triton")
from kmem_kernels.segment_reduce.op import segment_reduce, segments_of
from kmem_kernels.segment_reduce.reference import CHUNK


def ids(count, segments, seed=0):
    """Zipf-like: a few ids are frequent, many do not occur."""
    chance = torch.rand(count, generator=torch.Generator().manual_seed(seed))
    return (segments * chance**4).long()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "count, segments, columns",
    [
        (1, 1, 1),
        (7, 3, 24),
        (33, 100, 40),
        (3 * CHUNK + 1, 1, 8),
        (CHUNK, 2, 264),
        (2000, 150, 40),
        pytest.param(2 * CHUNK + 2, 2, 600, marks=pytest.mark.full),
    ],
)
def test_bitwise_equal_to_the_definition(count, segments, columns, dtype, device):
    order, starts = segments_of(ids(count, segments), segments)
    values = random(count, columns, dtype=dtype)
    expected = segment_reduce(values, order, starts, backend="torch")
    on_device = values.to(device), order.to(device), starts.to(device)
    assert torch.equal(segment_reduce(*on_device, backend="triton").cpu(), expected)
    exact = torch.zeros(segments, columns, dtype=torch.float64).index_add_(0, ids(count, segments), values.double())
    torch.testing.assert_close(expected, exact.float(), atol=1e-4, rtol=1e-5)

    total = random(segments, columns, seed=1)
    found = total.to(device, copy=True)
    assert segment_reduce(*on_device, found, backend="triton") is found
    assert torch.equal(found.cpu(), total + expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("length", [1, CHUNK, CHUNK + 1, 700])
def test_a_segment_does_not_depend_on_its_neighbours(length, device):
    values = random(length, 24).to(device)
    alone = segment_reduce(values, *segments_of(torch.zeros(length, dtype=torch.int64, device=device), 1))
    beside = torch.cat([random(41, 24, seed=1).to(device), values, random(5, 24, seed=2).to(device)])
    owners = torch.tensor([0] * 41 + [1] * length + [2] * 5, device=device)
    sums = segment_reduce(beside, *segments_of(owners, 3), backend="triton")
    assert torch.equal(sums[1], alone[0])


@pytest.mark.parametrize("device", DEVICES)
def test_rows_outside_are_not_read_and_empty_segments_are_zero(device):
    values = random(10, 24).to(device)
    values[[0, 4]] = float("nan")
    order = torch.tensor([9, 1, 2, 9], device=device)
    starts = torch.tensor([0, 0, 3, 3, 4], device=device)
    sums = segment_reduce(values, order, starts, backend="triton")
    assert sums[[0, 2]].eq(0).all()
    assert torch.equal(sums[1], values[9] + values[1] + values[2])
    total = torch.full((4, 24), float("nan"), device=device)
    total[[1, 3]] = 1
    segment_reduce(values, order, starts, total, backend="triton")
    assert total[[0, 2]].isnan().all()
    assert torch.equal(total[3], 1 + values[9])


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_to_sum(device):
    order, starts = segments_of(torch.zeros(0, dtype=torch.int64, device=device), 3)
    for backend in ("torch", "triton"):
        sums = segment_reduce(torch.zeros(0, 5, device=device), order, starts, backend=backend)
        assert torch.equal(sums, torch.zeros(3, 5, device=device))
    none = segment_reduce(torch.zeros(0, 5, device=device), order, starts[:1], backend="triton")
    assert none.shape == (0, 5)


def test_segments_of_equal_ids():
    order, starts = segments_of(torch.tensor([3, 1, 3, 0, 1]), 5)
    assert order.tolist() == [3, 1, 4, 0, 2]
    assert starts.tolist() == [0, 1, 3, 3, 5, 5]


def test_refusals():
    order, starts = segments_of(torch.tensor([0, 1]), 2)
    with pytest.raises(ValueError, match="float64"):
        segment_reduce(random(2, 3).double(), order, starts)
    with pytest.raises(ValueError, match=r"total .*fp32 \(2, 3\).* \(3, 3\)"):
        segment_reduce(random(2, 3), order, starts, torch.zeros(3, 3))
