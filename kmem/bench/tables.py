"""Training steps of a model with an engram whose tables are small, large in host memory, or mapped from files."""

import itertools
import mmap
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from kmem.bench.contest import Runner
from kmem.bench.training import random_tokens, sequence_batches
from kmem.config import Config, parse_config
from kmem.data.batch import SequenceBatch
from kmem.data.reader import open_data
from kmem.model.engram_reader import EngramAddresses, table_name
from kmem.parallel.mesh import Mesh
from kmem.tables.table import Table
from kmem.train.dry_run import TableBytes, rank_bytes

TokenKind = Literal["zipf", "uniform", "text"]


def zipf_tokens(config: Config, step: int) -> Tensor:
    """Tokens of a step, int64 [global batch, T + 1]. They are drawn independently, the n-th most frequent one with
    probability proportional to 1 / n: words repeat as in text, but phrases do not."""
    generator = torch.Generator().manual_seed(step)
    shares = 1 / torch.arange(1, config.model.shape.vocab_size + 1, dtype=torch.float64)
    rows, columns = config.train.global_batch_size, config.data.sequence_length + 1
    return torch.multinomial(shares, rows * columns, replacement=True, generator=generator).view(rows, columns)


DRAWS: dict[str, Callable[[Config, int], Tensor]] = {"zipf": zipf_tokens, "uniform": random_tokens}


def step_batches(config: Config, kind: TokenKind) -> Iterator[list[SequenceBatch]]:
    """The micro-batches of each step, without end: drawn tokens, or the prepared text of the configuration."""
    if kind != "text":
        yield from sequence_batches(config, DRAWS[kind])
    reader = open_data(config.data, config.model.vocab_size).training
    batch, part = config.train.global_batch_size, config.train.micro_batch_size
    for start in itertools.count(0, batch):
        yield [reader.read(range(first, first + part)) for first in range(start, start + batch, part)]


def tables(config: Config) -> list[TableBytes]:
    """The tables of a model on one rank."""
    (stage,) = rank_bytes(config, Mesh(0, 1, 1, 1))
    return list(stage.tables)


def sized(config: Config, size: int, **settings: Any) -> dict[str, Any]:
    """The configuration as nested dicts, with rows per head chosen so that all tables and their rows' state take about
    `size` bytes.

    Args:
        settings: changes to the section `engram`.
    """
    engram = config.model.engram
    assert engram is not None
    assert engram.orders is not None
    assert engram.heads is not None
    tree = config.model_dump(mode="json")
    tree["engram"] |= settings
    table = tables(parse_config(tree))[0]
    row = table.row_bytes + table.state_bytes + table.busy_bytes
    heads = len(engram.layers) * len(engram.orders) * engram.heads
    tree["model"]["engram"]["rows_per_head"] = max(1, size // (row * heads))
    return tree


def table_runner(tree: dict[str, Any], kind: TokenKind) -> Runner:
    """A runner of kmem's pipeline with its tables, on tokens of this kind. Every page of the tables is written first.

    A round is timed until the last update and fetch that its steps queued are done, so none of their work falls into
    the pause after it.
    """
    from kmem.parallel.joining import join_mesh
    from kmem.parallel.pipeline import Pipeline

    config = parse_config(tree)
    addresses = EngramAddresses.build(config.model.shape, eos_token_id=0)
    pipeline = Pipeline(config, join_mesh(config), {"engram": addresses})
    own = pipeline.stage_tables.tables
    for table in own.values():
        write_all(table)
    moved = {  # bytes per row: out of the store, and the gradient back
        table.number: table.row_bytes + own[table_name(table.number)].spec.dim * torch.float32.itemsize
        for table in tables(config)
    }
    batches = step_batches(config, kind)
    begun = deque(pipeline.begin_step(next(batches)) for _ in range(config.engram.prefetch_depth))

    def run(steps: int) -> dict[str, Any]:
        prepared = list(itertools.islice(batches, steps))
        results = []
        began = time.perf_counter()
        for batch in prepared:
            begun.append(pipeline.begin_step(batch))
            results.append(pipeline.train_step(begun.popleft(), config.train.optimizer.lr))
        for table in own.values():
            table.drain()
        seconds = time.perf_counter() - began
        engram = [result.memories["engram"] for result in results]
        return {
            "seconds": seconds,
            "losses": [result.loss for result in results],
            **{
                name: [sum(figures[name] for figures in step.values()) for step in engram]
                for name in ("stall_ms", "fetch_ms", "owner_ms", "unique_rows")
            },
            "bytes": [sum(step[str(layer)]["unique_rows"] * size for layer, size in moved.items()) for step in engram],
        }

    return run


def write_all(table: Table) -> None:
    """Write the pages that a new table leaves as the system's zeros, so that they occupy memory or disk as in a long
    run."""
    store = table.store
    if store.layout is None or store.layout.stride > mmap.PAGESIZE:  # otherwise every page has a row that was drawn
        for start, stop in store.chunks("rows"):
            store.fetch_ahead(np.arange(start, stop))
            for name, array in store.arrays.items():
                if name != "rows":
                    array[start:stop].zero_()
    store.flush()
