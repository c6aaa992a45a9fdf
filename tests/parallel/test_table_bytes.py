"""What a table costs: rows over ranks, and the rows in use."""

from dataclasses import replace

import pytest

from kmem.config import RowOptimizerConfig, TableConfig
from kmem.parallel.mesh import Mesh
from kmem.parallel.table_bytes import TableBytes
from kmem.tables.sharding import row_range
from kmem.tables.table import Table
from kmem.tables.table_spec import TableSpec
from kmem.tables.worker import TableWorker
from tests.tables.toy import opened

ADAM = RowOptimizerConfig()


def planned(optimizer=ADAM, data=1, rows=101, look_ups=40, **settings):
    mesh = Mesh(0, 2, data, 1)
    return TableBytes.of("bank", "level", 3, TableConfig(**settings), optimizer, mesh, rows, 8, look_ups, 60)


@pytest.mark.parametrize("store", ["host", "mmap"])
def test_frozen_rows_have_no_state(store, tmp_path):
    found = planned(None, store=store)
    assert found.state_bytes == 0 < planned(store=store).state_bytes
    worker = TableWorker()
    folder = tmp_path if store == "mmap" else None
    with opened(Table(TableSpec("table", 101, 8, store=store, folder=folder), None, worker)) as table:
        assert 0 <= table.store.bytes - found.bytes < 2 * 4096  # up to a page for rows and for counts
    worker.close()


@pytest.mark.parametrize("data", [1, 2, 3, 7])
def test_the_rows_are_those_of_the_rank_with_most(data):
    most = max(len(row_range(101, data, rank)) for rank in range(data))
    found = planned(data=data)
    assert found.rows == most == -(-101 // data)
    assert found.bytes == most * (found.row_bytes + found.state_bytes + found.busy_bytes)


def test_rows_in_use_are_bounded_by_look_ups_and_by_the_table():
    """Rows and gradients in fp32 whatever they are stored as, and an index of 8 bytes for each look-up."""
    assert planned(dtype="bf16").working_set == 2 * 40 * 8 * 4 + 60 * 8
    assert planned(look_ups=1000).working_set == 2 * 101 * 8 * 4 + 60 * 8
    assert (
        planned(data=2, look_ups=1000).working_set == planned(look_ups=1000).working_set
    )  # a rank reads all ranks' rows
    for depth in (0, 1, 3):
        assert planned(dtype="bf16", prefetch_depth=depth).host_buffers == depth * (40 * 8 * 2 + 60 * 8)


def test_a_type_of_half_the_width_halves_rows_and_not_their_state():
    full, half = planned(), planned(dtype="bf16")
    assert full.row_bytes == 2 * half.row_bytes == 32
    assert replace(half, row_bytes=full.row_bytes, host_buffers=full.host_buffers) == full
