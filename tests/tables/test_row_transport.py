"""Rows gathered in place, here by the kernels' torch backend, on a stream that lags as far as a stream may."""

import threading
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kmem.config import RowOptimizerConfig
from kmem.tables import table as table_module
from kmem.tables.device_copy import DeviceCopy, PinnedRing
from kmem.tables.exchange import Exchange
from kmem.tables.row_transport import InPlace, ThroughHost, make_row_transport
from kmem.tables.stores import ArrayLayout, Store
from kmem.tables.table import Table
from kmem.tables.table_spec import TableSpec
from kmem.tables.worker import TableWorker
from tests.tables.toy import DIM, ROWS, mapped, opened, train

pytest.importorskip("triton")


class Lagging(DeviceCopy):
    """Work is done when it is waited for, all in its order, and not before."""

    def __init__(self, device, depth=1):
        super().__init__(device, depth)
        self.queued = []
        self.lock = threading.RLock()  # both threads wait

    def run(self, work):
        self.queued.append(work)

    def settle(self):
        with self.lock:
            while self.queued:
                self.queued.pop(0)()

    def to_host(self, values, computed):
        self.settle()
        return super().to_host(values, computed)

    def fetch(self, work):
        self.settle()
        return super().fetch(work)

    def hand_over(self, working_set, arrived):
        self.settle()
        return super().hand_over(working_set, arrived)


class NeverWaiting(Lagging):
    """Negative control: updates do not wait for gathers."""

    def settle(self):
        pass

    def hand_over(self, working_set, arrived):
        Lagging.settle(self)
        return working_set


def test_rows_on_a_device_are_gathered_on_the_workers_stream():
    """And not behind the running step, on that of the main thread."""
    inside = []

    class Streamed(DeviceCopy):
        @contextmanager
        def _streamed(self):
            inside.append(True)
            yield
            inside.pop()

    class Table(torch.Tensor):
        def __getitem__(self, rows):
            assert inside, "gathered on another stream"
            return super().__getitem__(rows)

    values = torch.arange(12.0).view(6, 2)
    store = type("Store", (), {"on_host": False, "__getitem__": lambda self, name: values.as_subclass(Table)})()
    transport = ThroughHost(store, Exchange(), None, Streamed(torch.device("cpu")))
    assert transport._gather(np.array([4, 1])).tolist() == [[8.0, 9.0], [2.0, 3.0]]


@pytest.fixture
def worker():
    worker = TableWorker(timeout_seconds=30)
    yield worker
    worker.close()


@pytest.fixture
def in_place(monkeypatch):
    """Tables that serve in place, as on a device."""

    def start(store="host", copy=DeviceCopy):
        monkeypatch.setattr(
            table_module, "make_row_transport", lambda store, exchange, threads, copy: InPlace(store, copy)
        )
        monkeypatch.setattr(table_module, "DeviceCopy", copy)
        if store == "device":
            monkeypatch.setattr(Store, "on_host", False)

    return start


@pytest.mark.parametrize("prefetch, staleness", [(0, 0), (1, 0), (2, 0), (2, 1)])
@pytest.mark.parametrize("copy", [DeviceCopy, Lagging])
@pytest.mark.parametrize("store", ["host", "device"])
def test_rows_served_in_place_are_bit_identical(store, copy, prefetch, staleness, worker, in_place):
    arguments = {
        "prefetch": prefetch,
        "staleness": staleness,
        "spec": TableSpec("toy.memory", ROWS, DIM, "bf16", store, init_std=0.5),
        "optimizer": RowOptimizerConfig(name="adam_catchup", stochastic_rounding=True, clip_norm=0.05),
        "skip": (3,),
        "evaluate_every": 4,
    }
    expected = train(worker, 15, **arguments)
    in_place(store, copy)
    found = train(worker, 15, **arguments)
    assert found.losses == expected.losses
    assert torch.equal(found.rows, expected.rows)
    assert all(torch.equal(found.state[name], values) for name, values in expected.state.items())
    assert any(metrics.conflict_rows for metrics in found.metrics) == (prefetch > staleness)


@pytest.mark.parametrize("copy, exact", [(DeviceCopy, True), (Lagging, True), (NeverWaiting, False)])
def test_an_update_on_the_host_waits_for_gathers(copy, exact, worker, in_place):
    """Of rows that were handed out stale, in a step without gradients, whose copy would have waited."""
    in_place("host", copy)
    optimizer = RowOptimizerConfig(name="adam_catchup", weight_decay=0.5)
    ids = torch.arange(12).view(1, 1, 4, 3)
    spec = TableSpec("toy.memory", ROWS, DIM, init_std=0.5)
    with opened(Table(spec, optimizer, worker, staleness=1)) as table:
        before = table.store["rows"][:12].clone()
        first, second = table.begin(ids), table.begin(ids)
        table._worker.call(lambda: None)
        first.commit(1.0, 0.1)
        table._worker.call(lambda: None)
        assert (table.store["rows"][:12] != before).any()
        assert torch.equal(second.result().rows, before) == exact


def test_the_rule_of_serving(tmp_path, monkeypatch):
    """In place on CUDA, where a rank is alone and the store can be read by a device; otherwise through the host. Only
    what a device reads in host memory is pinned."""
    pinned = []
    monkeypatch.setattr(Store, "pin", lambda store, array: pinned.append((store.kind, array)))

    def chosen(kind, device, ranks):
        exchange = Exchange()
        exchange.ranks = ranks
        copy = DeviceCopy(torch.device("cpu"))
        copy.device = torch.device(device)
        store = Store(kind, 4, {"rows": ArrayLayout(2, torch.float32)}, path=tmp_path / "rows")
        store.arrays["rows"] = SimpleNamespace(device=torch.device("cuda" if kind == "device" else "cpu"))
        return type(make_row_transport(store, exchange, None, copy))

    assert chosen("host", "cuda", 1) is chosen("device", "cuda", 1) is InPlace
    assert chosen("mmap", "cuda", 1) is ThroughHost
    for kind in ("host", "device"):
        assert chosen(kind, "cuda", 2) is chosen(kind, "cpu", 1) is ThroughHost
    assert pinned == [("host", "rows")]


class Memory:
    def __init__(self, size, log):
        self.bytes = torch.zeros(size, dtype=torch.uint8)
        self.log = log
        log.append(size)

    def close(self):
        self.log.append(-len(self.bytes))


class Event:
    def __init__(self):
        self.passed = False

    def synchronize(self):
        self.passed = True


def test_a_pinned_buffer_is_used_again_when_its_copy_is_through():
    log, ring_events = [], []
    ring = PinnedRing(3, lambda size: Memory(size, log))
    in_use = {}
    for step in range(10):
        buffer = ring.take(100)
        event = in_use.get(buffer.data_ptr())
        assert event is None or event.passed
        # The copies of the two steps before may still run.
        assert not any(other.passed for other in ring_events[-2:])
        ring_events.append(Event())
        in_use[buffer.data_ptr()] = ring_events[-1]
        ring.copied(ring_events[-1])
        assert len(in_use) == min(step + 1, 3)
    assert len(log) == 3
    ring.close()
    assert all(event.passed for event in ring_events)
    assert sum(log) == 0


def test_pinned_buffers_grow_to_the_largest_size_and_are_freed():
    log = []
    ring = PinnedRing(2, lambda size: Memory(size, log))
    for size in [10, 500, 20, 30, 510, 505, 520, 515]:
        assert len(ring.take(size)) >= size
        ring.copied(Event())
    allocated = [size for size in log if size > 0]
    assert len(allocated) == 3  # each at its first use, and the first again for 510 bytes, with room for 520
    assert allocated[0] < 500 <= allocated[1]
    ring.close()
    assert sum(log) == 0


def test_a_mapped_table_never_meets_a_device(worker, tmp_path):
    with opened(Table(mapped(tmp_path), RowOptimizerConfig(), worker)) as table:
        assert isinstance(table._transport, ThroughHost)
