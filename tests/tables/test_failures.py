"""Nothing leaks, nobody waits for ever, and what users can cause is a clear error."""

import contextlib
import ctypes
import gc
import re
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch.distributed import checkpoint as dcp

from kmem.checkpoint import pieces
from kmem.checkpoint.commit import Commit, Progress
from kmem.checkpoint.pieces import PiecesLoadPlanner, PiecesSavePlanner
from kmem.checkpoint.storage import SafetensorsStorageReader, SafetensorsStorageWriter
from kmem.config import RowOptimizerConfig, UserError
from kmem.data.safetensors_file import SafetensorsWriter
from kmem.tables import stores
from kmem.tables.exchange import ExchangeError
from kmem.tables.table import Table
from kmem.tables.table_spec import TableSpec
from kmem.tables.worker import TableWorker
from tests.tables.toy import ROWS, SPEC, assert_nothing_is_left, committed_or_skipped, opened, rank_ids, start_worker


@pytest.fixture
def worker():
    worker = TableWorker(timeout_seconds=20)
    yield worker
    worker.close()
    assert not worker._thread.is_alive()


def open_table(worker, **arguments):
    return Table(SPEC, RowOptimizerConfig(), worker, **arguments)


def ids(step):
    return rank_ids(step, 0, 1)


def step_through(ticket, skip=False):
    ticket.result().lookup(0).sum().backward()
    ticket.commit(1.0, 0.1, skip=skip)


def test_a_step_left_without_commit_is_skipped(worker):
    with opened(open_table(worker)) as table:
        before = table.read_rows(0, ROWS)
        with committed_or_skipped(table.begin(ids(0))) as ticket:
            ticket.result().lookup(0).sum().backward()
            table.begin(ids(1))
        assert table._optimizer_step == 0
        assert torch.equal(table.read_rows(0, ROWS), before)
        with pytest.raises(AssertionError, match=r"step .*committed .*before"):
            ticket.commit(1.0, 0.1)


def test_an_exception_in_a_step_releases_it(worker):
    with opened(open_table(worker, depth=2)) as table:
        with contextlib.ExitStack() as stack:
            stack.enter_context(pytest.raises(ExceptionGroup))
            first, *_ = (stack.enter_context(committed_or_skipped(table.begin(ids(step)))) for step in range(3))
            raise ExceptionGroup("in the middle of a step", [ValueError(first.result())])
        assert_nothing_is_left(table)
        step_through(table.begin(ids(3)))
        assert_nothing_is_left(table)


def test_a_skipped_step_serves_the_rows_that_waited_for_it(worker):
    with opened(open_table(worker)) as table:
        first, second = table.begin(ids(0)), table.begin(ids(0))
        step_through(first, skip=True)
        assert torch.equal(second.result().rows, first.result().rows)
        assert second.metrics.conflict_rows == second.metrics.unique_rows
        step_through(second)
        assert_nothing_is_left(table)


def test_evaluation_leaves_no_trace(worker):
    with opened(open_table(worker)) as table:
        first = table.begin(ids(0))
        second = table.begin(ids(1))
        with torch.no_grad():
            evaluated = table.evaluate(ids(0))
            assert torch.equal(evaluated.lookup(1), first.result().lookup(1))
        step_through(first)
        assert not torch.equal(table.evaluate(ids(0)).rows, evaluated.rows)
        step_through(second)
        assert_nothing_is_left(table)


def test_closing_with_steps_in_flight(worker):
    table = open_table(worker)
    table.begin(ids(0)).result()
    table.begin(ids(1))
    table.close()
    assert not worker._promises
    assert table.store.arrays == {}


def test_a_closed_table_gives_its_file_and_mapping_back(worker, tmp_path):
    table = Table(replace(SPEC, store="mmap", folder=tmp_path), RowOptimizerConfig(), worker)
    assert str(tmp_path) in Path("/proc/self/maps").read_text()
    step_through(table.begin(ids(0)))
    table.close()
    del table
    gc.collect()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_waiting_for_rows_that_wait_for_oneself_is_caught(worker):
    with opened(open_table(worker)) as table:
        table.begin(ids(0))
        with pytest.raises(AssertionError, match=r"step 1 .*\[0\]"):
            table.begin(ids(1)).result()
        with pytest.raises(AssertionError, match=r"\b2 steps .*prefetch depth .*\b1$"):
            table.begin(ids(2))


def test_after_an_error_every_ticket_fails_with_it(worker):
    table = open_table(worker)
    missing = pytest.raises(ExchangeError, match=r"table toy\.\w+ .*\b97 rows\b.*\b95 to 97\b")
    with committed_or_skipped(table.begin(torch.arange(95, 98).expand(1, 1, 2, 3))) as failing, missing:
        failing.result()
    later = table.begin(ids(1))
    with pytest.raises(ExchangeError, match=r"table toy\.\w+ .*\b97 rows\b"):
        later.result()
    with pytest.raises(ExchangeError, match=r"table toy\.\w+ .*\b97 rows\b"):
        table.evaluate(ids(1))
    table.close()


def test_an_exception_that_leaves_the_table_stops_its_worker(worker):
    def training():
        with opened(open_table(worker)) as table:
            table.begin(ids(0))
            raise KeyError("in user code")

    with pytest.raises(KeyError):
        training()
    assert not worker._promises
    with pytest.raises(ExchangeError, match="in user code"):
        worker.call(lambda: None)


def one_rank_raises(world):
    """Rank 1 fails between two steps, with a prefetched step that waits for rows: it leaves at once."""
    worker = start_worker(world, timeout_seconds=3.0)
    rank = worker.exchange.rank

    def training():
        with opened(open_table(worker)) as table:
            first, second = table.begin(rank_ids(0, rank, world)), table.begin(rank_ids(0, rank, world))
            with committed_or_skipped(first):
                first.result()
                if rank:
                    raise KeyError
                first.commit(1.0, 0.1)
            second.result()

    began = time.monotonic()
    with pytest.raises(KeyError if rank else ExchangeError):
        training()
    worker.close()
    return time.monotonic() - began


def test_a_rank_that_raises_leaves_at_once_and_the_others_in_time(ranks):
    seconds = ranks.run(2, one_rank_raises, 2)
    assert seconds[1] < 3
    assert seconds[0] < 8


def test_row_counts_that_overflow_are_refused():
    with pytest.raises(UserError, match=r"^table t: 1152921504606846976 rows of 64 values"):
        TableSpec("t", 1 << 60, 64)
    with pytest.raises(UserError, match=r"^table t: .*mmap.*folder"):
        TableSpec("t", 10, 64, store="mmap")


def absent_rank(world):
    """Rank 1 does not take part in the second step."""
    worker = start_worker(world, timeout_seconds=2.0)
    table = open_table(worker)
    ticket = table.begin(rank_ids(0, worker.exchange.rank, world))
    step_through(ticket)
    table.drain()
    began = time.monotonic()
    if worker.exchange.rank == 1:
        time.sleep(6)
        return None
    with pytest.raises(ExchangeError, match=r"tables: .*\bexchange\b") as caught:
        table.begin(rank_ids(1, 0, world)).result()
    table.close()
    worker.close()
    assert time.monotonic() - began < 8
    return str(caught.value)


def failing_owner(world):
    """Rank 1 asks for a row that does not exist, in the middle of a run."""
    worker = start_worker(world, timeout_seconds=2.0)
    table = open_table(worker)
    step_through(table.begin(rank_ids(0, worker.exchange.rank, world)))
    wanted = rank_ids(1, worker.exchange.rank, world) + ROWS * worker.exchange.rank
    with pytest.raises(ExchangeError) as caught:
        table.begin(wanted).result()
    table.close()
    worker.close()
    return str(caught.value)


@pytest.mark.parametrize("case", [absent_rank, failing_owner])
def test_a_rank_that_is_gone_stops_the_others_in_time(ranks, case):
    messages = [message for message in ranks.run(2, case, 2) if message]
    assert all(re.match(r"[\w ]*tables: .*\bexchange\b", message) for message in messages)
    if case is failing_owner:
        assert len(messages) == 2
        assert re.search(r"table toy\.\w+ .*\b97 rows\b", messages[1])


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))


CHUNK = 1 << 20


def memory_of_training(rows, folder):
    """Largest anonymous memory while a mapped table is made, filled, trained, saved and loaded, beyond that before:
    in training, and in checkpoints."""
    torch.set_num_threads(1)
    worker = TableWorker(timeout_seconds=60)
    gc.collect()
    before, training, checkpoints = anonymous_bytes(), 0, 0
    spec = TableSpec("big", rows, 32, store="mmap", folder=Path(folder))
    optimizer = RowOptimizerConfig(name="adam_catchup")
    with opened(Table(spec, optimizer, worker)) as table:
        apply = table._optimizer.apply

        def watched(*arguments):
            nonlocal training
            apply(*arguments)
            training = max(training, anonymous_bytes() - before)

        table._optimizer.apply = watched
        for step in range(3):
            wanted = np.random.default_rng(step).integers(0, rows, (1, 1, 500, 4))
            step_through(table.begin(torch.from_numpy(wanted)))
        state = table.pieces()
        norms, before = table.row_norms(100), anonymous_bytes()

        def watch(method):
            def watching(*arguments):
                nonlocal checkpoints
                checkpoints = max(checkpoints, anonymous_bytes() - before)
                result = method(*arguments)
                checkpoints = max(checkpoints, anonymous_bytes() - before)
                return result

            return watching

        commits = []
        with (
            mock.patch.object(SafetensorsWriter, "_append", watch(SafetensorsWriter._append)),
            mock.patch.object(PiecesLoadPlanner, "commit_tensor", watch(PiecesLoadPlanner.commit_tensor)),
        ):
            writer = SafetensorsStorageWriter(Path(folder), 0, lambda *stored: commits.append(stored))
            dcp.save(state, storage_writer=writer, planner=PiecesSavePlanner(), no_dist=True)
            for array in table.store.arrays.values():
                array.zero_()
            reader = SafetensorsStorageReader(Path(folder), Commit(Progress(3, 3, 3, 0), {}, {}, *commits[0]))
            dcp.load(state, storage_reader=reader, planner=PiecesLoadPlanner(), no_dist=True)
        assert torch.equal(table.row_norms(100), norms)
    worker.close()
    return training, checkpoints


M_MMAP_THRESHOLD = -3


def small_chunks(sizes, folder):
    # Real chunks are too large for the heap, so each gets its own pages and gives them back. So do these.
    assert ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, CHUNK // 4)
    with (
        mock.patch.object(stores, "CHUNK_BYTES", CHUNK),
        mock.patch.object(pieces, "CHUNK_ELEMENTS", CHUNK // 4),
    ):
        memory_of_training(sizes[0], folder)  # compilers and allocators have had their share
        return [memory_of_training(rows, folder) for rows in sizes]


def test_anonymous_memory_does_not_grow_with_the_table(ranks, tmp_path):
    """A table of 16 times the rows: 100 MB more of rows and state, none of it in anonymous memory, also when it is
    saved and loaded: that takes two chunks at most. (The plan of a checkpoint has a few KiB for each of its chunks.)"""
    (((small, _), (large, checkpoints)),) = ranks.run(1, small_chunks, (16_000, 256_000), str(tmp_path))
    assert large - small < 4e6, f"{small} and {large} bytes"
    assert checkpoints < 2 * CHUNK + 1e6, f"{checkpoints} bytes"
