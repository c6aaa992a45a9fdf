"""Rows by their numbers: moved bit by bit, to where they belong and nowhere else."""

import pytest
import torch

from tests.kernels.devices import DEVICES, random

pytest.importorskip("triton")
from kmem_kernels.row_gather.op import row_gather


def drawn(count, rows, seed=0):
    return torch.randint(rows, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "count, rows, columns", [(1, 1, 1), (5, 3, 7), (300, 90, 12), (1000, 50, 64), (257, 400, 132), (70, 9, 264)]
)
def test_rows_are_moved_bit_by_bit(count, rows, columns, dtype, device):
    table, ids = random(rows, columns, dtype=dtype), drawn(count, rows)
    expected = table[ids].float()
    for backend in ("torch", "triton"):
        assert torch.equal(row_gather(table.to(device), ids.to(device), backend=backend).cpu(), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_rows_go_to_their_places_and_others_stay(backend, device):
    table, ids = random(40, 12).to(device), drawn(30, 40).to(device)
    places = torch.randperm(50, generator=torch.Generator().manual_seed(1))[:30].to(device)
    out = random(50, 12, seed=2).to(device)
    expected = out.clone()
    expected[places] = table[ids]
    assert row_gather(table, ids, out, places, backend=backend) is out
    assert torch.equal(out, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_no_rows(device):
    none = torch.zeros(0, dtype=torch.int64, device=device)
    for backend in ("torch", "triton"):
        assert row_gather(random(4, 5).to(device), none, backend=backend).shape == (0, 5)
        out = random(3, 5).to(device)
        assert torch.equal(row_gather(random(4, 5).to(device), none, out.clone(), none, backend=backend), out)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("registered", [False, True])
def test_a_device_reads_pinned_host_memory_in_place(dtype, registered):
    """Also from the middle of an allocation, as the arrays of a store are; and what the host wrote last."""
    memory = torch.zeros(1 << 20, dtype=torch.uint8, pin_memory=not registered)
    if registered:
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), len(memory), 0))
    try:
        table = memory[4096 : 4096 + 1000 * 24 * dtype.itemsize].view(dtype).view(1000, 24)
        ids = drawn(20_000, 1000)
        for seed in range(3):
            table.copy_(random(1000, 24, seed=seed))
            found = row_gather(table, ids.cuda())
            assert torch.equal(found.cpu(), table[ids].float())
    finally:
        torch.cuda.synchronize()
        if registered:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(memory.data_ptr()))


@pytest.mark.gpu
def test_pageable_host_memory_is_refused():
    with pytest.raises(ValueError, match="pinned"):
        row_gather(torch.zeros(4, 4), torch.zeros(2, dtype=torch.int64, device="cuda"))


def test_refusals():
    table, ids = random(4, 5), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="float64"):
        row_gather(table.double(), ids)
    with pytest.raises(ValueError, match="contiguous"):
        row_gather(table.T, ids)
    with pytest.raises(ValueError, match=r"^2 rows of 5 .*\(3, 5\)"):
        row_gather(table, ids, torch.zeros(3, 5))
    with pytest.raises(ValueError, match=r"^2 rows of 5 .*\(2, 5\)"):
        row_gather(table, ids, torch.zeros(2, 5, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"^3 places .*\b2 rows"):
        row_gather(table, ids, torch.zeros(9, 5), torch.arange(3))
    with pytest.raises(ValueError, match=r"^places .*output"):
        row_gather(table, ids, None, torch.arange(2))
