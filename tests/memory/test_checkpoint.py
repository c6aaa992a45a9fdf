"""Rows and their state through a checkpoint, from any number of ranks to any other."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed import checkpoint as dcp

from kmem.checkpoint import pieces
from kmem.checkpoint.pieces import PiecesLoadPlanner, PiecesSavePlanner
from kmem.config import RowOptimizerConfig
from kmem.memory.table import Table
from tests.memory.toy import SPEC, rank_ids, start_worker

OPTIMIZER = RowOptimizerConfig(name="adam_catchup")


def steps(table, first, last, world):
    for step in range(first, last):
        with table.begin(rank_ids(step, table._exchange.rank, world)) as ticket:
            (ticket.result().lookup(0) ** 2).sum().backward()
            ticket.commit(1 / world, 0.1)


def whole(table, world):
    """Rows and state of all ranks."""
    table.drain()
    shards = [None] * world
    mine = {name: table.store[name].clone() for name in table.store.arrays if name != "busy"}
    if world == 1:
        return mine
    dist.all_gather_object(shards, mine)
    return {name: torch.cat([shard[name] for shard in shards]) for name in mine}


def save(world, folder):
    worker = start_worker(world)
    ten_rows = mock.patch.object(pieces, "CHUNK_ELEMENTS", 40)
    with ten_rows, Table(SPEC, OPTIMIZER, worker) as table:
        steps(table, 0, 3, world)
        dcp.save(table.pieces(), checkpoint_id=folder, planner=PiecesSavePlanner(), no_dist=world == 1)
        saved = whole(table, world)
        steps(table, 3, 5, world)
        later = whole(table, world)
    worker.close()
    return saved, later


def load(world, folder):
    worker = start_worker(world)
    with Table(SPEC, OPTIMIZER, worker) as table:
        dcp.load(table.pieces(), checkpoint_id=folder, planner=PiecesLoadPlanner(), no_dist=world == 1)
        loaded = whole(table, world)
        assert table.step == 3
        steps(table, 3, 5, world)
        later = whole(table, world)
    worker.close()
    return loaded, later


@pytest.mark.parametrize("source", [1, 2, 4])
def test_tables_are_resharded_exactly(ranks, tmp_path, source):
    saved, later = ranks.run(source, save, source, str(tmp_path))[0]
    assert saved["last_step"].max() == 3
    for target in (1, 2, 4):
        loaded, resumed = ranks.run(target, load, target, str(tmp_path))[0]
        assert all(torch.equal(loaded[name], saved[name]) for name in saved)
        if source == target:
            assert all(torch.equal(resumed[name], later[name]) for name in later)
