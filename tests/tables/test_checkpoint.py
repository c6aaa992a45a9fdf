"""Rows and their state through a checkpoint, from any number of ranks and any store to any other."""

from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed import checkpoint as dcp

from kmem.checkpoint import pieces
from kmem.checkpoint.commit import Commit, Progress
from kmem.checkpoint.pieces import PiecesLoadPlanner, PiecesSavePlanner
from kmem.checkpoint.storage import SafetensorsStorageReader, SafetensorsStorageWriter
from kmem.config import RowOptimizerConfig
from kmem.tables.table import Table
from tests.tables.toy import SPEC, opened, rank_ids, start_worker

OPTIMIZER = RowOptimizerConfig(name="adam_catchup")


def steps(table, first, last, world):
    for step in range(first, last):
        ticket = table.begin(rank_ids(step, table._exchange.rank, world))
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


def spec(store, folder):
    return replace(SPEC, store=store, folder=Path(folder))


def save(world, folder, store="host"):
    worker = start_worker(world)
    ten_rows_and_a_half = mock.patch.object(pieces, "CHUNK_ELEMENTS", 42)
    with ten_rows_and_a_half, opened(Table(spec(store, folder), OPTIMIZER, worker)) as table:
        steps(table, 0, 3, world)
        dcp.save(table.pieces(), checkpoint_id=folder, planner=PiecesSavePlanner(), no_dist=world == 1)
        saved = whole(table, world)
        steps(table, 3, 5, world)
        later = whole(table, world)
    worker.close()
    return saved, later


def load(world, folder, store="host"):
    worker = start_worker(world)
    with opened(Table(spec(store, folder), OPTIMIZER, worker)) as table:
        dcp.load(table.pieces(), checkpoint_id=folder, planner=PiecesLoadPlanner(), no_dist=world == 1)
        loaded = whole(table, world)
        assert table._optimizer_step == 3
        steps(table, 3, 5, world)
        later = whole(table, world)
    worker.close()
    return loaded, later


@pytest.mark.parametrize(
    "source, stores",
    [
        (1, "hmh"),
        pytest.param(2, "mhm", marks=pytest.mark.full),
        pytest.param(4, "hhm", marks=pytest.mark.full),
        (4, "mmh"),
    ],
)
def test_tables_are_resharded_exactly(ranks, tmp_path, source, stores):
    """`stores`: of the save, and of the loads by one rank and by several; h(ost) or m(map)."""
    stores = [{"h": "host", "m": "mmap"}[letter] for letter in stores]
    saved, later = ranks.run(source, save, source, str(tmp_path), stores[0])[0]
    assert saved["last_step"].max() == 3
    for target in (1, 2, 4):
        loaded, resumed = ranks.run(target, load, target, str(tmp_path), stores[1 if target == 1 else 2])[0]
        assert all(torch.equal(loaded[name], saved[name]) for name in saved)
        if source == target:
            assert all(torch.equal(resumed[name], later[name]) for name in later)


def test_files_do_not_depend_on_the_store(tmp_path):
    """Every entry has its name and its bytes from either layout, and each loads into the other."""
    worker = start_worker(1)
    three_rows_and_a_bit = mock.patch.object(pieces, "CHUNK_ELEMENTS", 13)
    written, commits = [], []
    for store in ("host", "mmap"):
        folder = tmp_path / store
        folder.mkdir()

        def commit(tensors, files, folder=folder):
            commits.append(Commit(Progress(3, 3, 3, 0), {}, {}, tensors, files))

        with three_rows_and_a_bit, opened(Table(spec(store, tmp_path), OPTIMIZER, worker)) as table:
            steps(table, 0, 3, 1)
            writer = SafetensorsStorageWriter(folder, 0, commit)
            dcp.save(table.pieces(), storage_writer=writer, planner=PiecesSavePlanner(), no_dist=True)
            written.append((whole(table, 1), (folder / "part-00000.safetensors").read_bytes()))
    assert written[0][1] == written[1][1]
    assert commits[0] == commits[1]
    for source, target in (("host", "mmap"), ("mmap", "host")):
        with opened(Table(spec(target, tmp_path), OPTIMIZER, worker)) as table:
            reader = SafetensorsStorageReader(tmp_path / source, commits[0])
            dcp.load(table.pieces(), storage_reader=reader, planner=PiecesLoadPlanner(), no_dist=True)
            loaded = whole(table, 1)
        assert all(torch.equal(loaded[name], values) for name, values in written[0][0].items())
    worker.close()
