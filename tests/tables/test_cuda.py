"""The same tables under a model on a GPU: with rows in host memory, in a file, or on the device."""

from collections import deque

import pytest
import torch

from kmem.config import RowOptimizerConfig
from kmem.tables.device_copy import DeviceCopy
from kmem.tables.row_transport import InPlace, ThroughHost
from kmem.tables.table import Table
from kmem.tables.table_spec import TableSpec
from kmem.tables.worker import TableWorker
from tests.tables.toy import DIM, ROWS, assert_nothing_is_left, committed_or_skipped, opened, rank_ids

pytestmark = pytest.mark.gpu
STEPS = 10


def train(device, spec, optimizer, ahead=1, lag=None, staleness=0):
    """Steps of a readout that has one right answer on every device: rows and their state after them.

    Gradients follow from the rows, but in multiples of 1/16, whose sums are exact in any order. `lag` delays the
    "model" or the "worker": its stream then does everything late.
    """
    worker = TableWorker(timeout_seconds=60)
    with opened(Table(spec, optimizer, worker, device, depth=2, staleness=staleness)) as table:
        if torch.device(device).type == "cuda":
            assert isinstance(table._transport, ThroughHost if spec.store == "mmap" else InPlace)
        tickets, begun = deque(), 0
        for step in range(STEPS):
            while begun <= min(step + ahead, STEPS - 1):
                if lag == "worker":
                    worker.call(lambda: table._copy.run(lambda: torch.cuda._sleep(20_000_000)))
                tickets.append(table.begin(rank_ids(begun, 0, 1)))
                begun += 1
            with committed_or_skipped(tickets.popleft()) as ticket:
                working_set = ticket.result()
                assert working_set.rows.device.type == torch.device(device).type
                if lag == "model":
                    torch.cuda._sleep(20_000_000)
                for micro in range(2):
                    rows = working_set.lookup(micro)
                    (rows * (rows.detach() * 16 + 1).round() / 16).sum().backward()
                ticket.commit(0.01, 0.05, skip=step == 4)
                if step == 6:
                    table.evaluate(rank_ids(3, 0, 1))
        assert_nothing_is_left(table)
        table.drain()
        state = {name: values.cpu().clone() for name, values in table.store.arrays.items() if name != "busy"}
    worker.close()
    return state


def settings(name, dtype, **more):
    return RowOptimizerConfig(name=name, dense=False, stochastic_rounding=dtype == "bf16", **more)


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], values) for name, values in two.items())


@pytest.mark.parametrize("store", ["host", "mmap", "device"])
@pytest.mark.parametrize("name", ["lazy_adam", "adam_catchup", "rowwise_adagrad", "sinkhorn_momentum"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_tables_under_a_gpu_model_are_those_of_a_cpu(store, name, dtype, tmp_path):
    """Bit for bit, prefetch on or off. Sinkhorn's momentum on a device is torch's, which adds up in another order."""
    optimizer = settings(name, dtype, weight_decay=0.1 if name == "adam_catchup" else 0.0)
    spec = TableSpec("toy.memory", ROWS, DIM, dtype, store, tmp_path, init_std=0.5)
    runs = [train("cuda", spec, optimizer, ahead) for ahead in (0, 1, 2)]
    assert same(runs[0], runs[1])
    assert same(runs[0], runs[2])
    on_cpu = train("cpu", TableSpec("toy.memory", ROWS, DIM, dtype, init_std=0.5), optimizer)
    if name == "sinkhorn_momentum" and store == "device":
        assert torch.allclose(runs[0]["rows"].float(), on_cpu["rows"].float(), atol=1e-5 if dtype == "fp32" else 1e-2)
    else:
        assert same(runs[0], on_cpu)


@pytest.mark.parametrize("store", ["host", "mmap", "device"])
@pytest.mark.parametrize("lag", ["model", "worker"])
@pytest.mark.parametrize("staleness", [0, 1])
def test_nothing_depends_on_which_stream_is_late(store, lag, staleness, tmp_path):
    optimizer = settings("adam_catchup", "bf16", clip_norm=0.05)
    spec = TableSpec("toy.memory", ROWS, DIM, "bf16", store, tmp_path, init_std=0.5)
    on_cpu = train("cpu", TableSpec("toy.memory", ROWS, DIM, "bf16", init_std=0.5), optimizer, 2, staleness=staleness)
    assert same(train("cuda", spec, optimizer, 2, lag, staleness), on_cpu)


def test_rows_written_before_the_first_step_are_there_on_the_workers_stream():
    """By work that the main thread's stream has not done yet."""
    worker = TableWorker(timeout_seconds=60)
    spec = TableSpec("toy.memory", ROWS, DIM, store="device", init_std=0.0)
    with opened(Table(spec, RowOptimizerConfig(), worker, "cuda")) as table:
        torch.cuda._sleep(100_000_000)
        table.store["rows"].fill_(3.0)
        assert table.begin(rank_ids(0, 0, 1)).result().rows.eq(3).all()
    worker.close()


def test_uploads_and_downloads_keep_what_they_were_given():
    """Through buffers that are used again, of sizes that grow, with the stream behind."""
    import numpy as np

    copy = DeviceCopy(torch.device("cuda"), depth=1)
    generator = np.random.default_rng(0)
    kept = []
    for step in range(20):
        if step % 5 == 0:
            copy.run(lambda: torch.cuda._sleep(20_000_000))
        arrays = [
            generator.integers(0, 9, int(generator.integers(0, 3000 * (step + 1)))),
            generator.integers(0, 1 << 15, (step, 3)).astype(np.uint16),
            generator.random((100, 7)).astype(np.float32),
        ]
        copies = copy.upload(*arrays)
        wanted = [array.copy() for array in arrays]
        for array in arrays:
            array[:] = 0  # the caller's again
        kept.append((copies, wanted))
        if step % 4 == 0:
            values = torch.arange(1000.0 * (step + 1), device="cuda")
            assert np.array_equal(copy.to_host(values, copy.mark()), np.arange(1000.0 * (step + 1), dtype=np.float32))
    copy.settle()
    for copies, wanted in kept:
        assert np.array_equal(copies[0].cpu().numpy(), wanted[0])
        assert np.array_equal(copies[1].view(torch.int16).cpu().numpy().view(np.uint16), wanted[1])
        assert np.array_equal(copies[2].cpu().numpy(), wanted[2])
    copy.close()


def test_the_gradient_sum_repeats_bit_for_bit():
    from kmem.tables.working_set import WorkingSet

    generator = torch.Generator("cuda").manual_seed(0)
    inverse = torch.randint(0, 50, (1, 64, 64, 8), device="cuda", generator=generator)
    gradient = torch.randn(64, 64, 8, 32, device="cuda", generator=generator)
    sums = []
    for _ in range(5):
        working_set = WorkingSet(torch.zeros(50, 32, device="cuda"), inverse)
        working_set.lookup(0).backward(gradient)
        sums.append(working_set.gradient)
    assert all(torch.equal(sums[0], other) for other in sums[1:])
