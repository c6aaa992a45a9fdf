"""The same tables under a model on a GPU: with rows in host memory, in a file, or on the device."""

import pytest
import torch

from kmem.config import RowOptimizerConfig
from kmem.memory.table import Table, TableSpec
from kmem.memory.worker import MemoryWorker
from tests.memory.toy import DIM, ROWS, assert_nothing_is_left, rank_ids

pytestmark = pytest.mark.gpu


def train(device, spec, optimizer, prefetch):
    """Ten steps of a readout that has one right answer on every device: rows after them."""
    worker = MemoryWorker(timeout_seconds=60)
    with Table(spec, optimizer, worker, device) as table:
        following = table.begin(rank_ids(0, 0, 1))
        for step in range(10):
            with following as ticket:
                working_set = ticket.result()
                assert working_set.rows.device.type == torch.device(device).type
                if prefetch:
                    following = table.begin(rank_ids(step + 1, 0, 1))
                for micro in range(2):
                    (working_set.lookup(micro) ** 2).sum().backward()
                ticket.commit(0.01, 0.05)
            if not prefetch:
                following = table.begin(rank_ids(step + 1, 0, 1))
        with following:
            pass
        assert_nothing_is_left(table)
        rows = table.read_rows(0, ROWS)
    worker.close()
    return rows


@pytest.mark.parametrize("store", ["host", "mmap", "device"])
@pytest.mark.parametrize("name", ["lazy_adam", "rowwise_adagrad", "sinkhorn_momentum"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_tables_under_a_gpu_model(store, name, dtype, tmp_path):
    optimizer = RowOptimizerConfig(name=name, dense=False, stochastic_rounding=dtype == "bf16")
    spec = TableSpec("toy.memory", ROWS, DIM, dtype, store, tmp_path, init_std=0.5)
    on, off = (train("cuda", spec, optimizer, prefetch) for prefetch in (True, False))
    assert torch.equal(on, off)
    on_cpu = train("cpu", TableSpec("toy.memory", ROWS, DIM, dtype, init_std=0.5), optimizer, prefetch=True)
    assert torch.allclose(on, on_cpu, atol=1e-5 if dtype == "fp32" else 1e-2)


def test_the_gradient_sum_repeats_bit_for_bit():
    from kmem.memory.working_set import WorkingSet

    generator = torch.Generator("cuda").manual_seed(0)
    inverse = torch.randint(0, 50, (1, 64, 64, 8), device="cuda", generator=generator)
    gradient = torch.randn(64, 64, 8, 32, device="cuda", generator=generator)
    sums = []
    for _ in range(5):
        working_set = WorkingSet(torch.zeros(50, 32, device="cuda"), inverse)
        working_set.lookup(0).backward(gradient)
        sums.append(working_set.gradient)
    assert all(torch.equal(sums[0], other) for other in sums[1:])
