"""A toy model whose tokens look up rows: one linear layer on K rows of D values, trained with a table of 97 rows."""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from kmem.config import RowOptimizerConfig
from kmem.tables.exchange import Exchange, join_groups
from kmem.tables.table import Table, Ticket
from kmem.tables.table_spec import StepMetrics, TableSpec
from kmem.tables.worker import TableWorker

ROWS, DIM, K = 97, 4, 3
SEQUENCES, LENGTH, MICRO_BATCHES = 8, 5, 2
SPEC = TableSpec("toy.memory", ROWS, DIM, init_std=0.5)


def step_ids(step: int) -> torch.Tensor:
    """Zipf-distributed row ids of a global batch [SEQUENCES, LENGTH, K]."""
    ids = np.random.default_rng([5, step]).zipf(1.3, (SEQUENCES, LENGTH, K))
    return torch.from_numpy((ids * 7) % ROWS)


def rank_ids(step: int, rank: int, world: int) -> torch.Tensor:
    """[M, B, LENGTH, K]: a rank's share."""
    share = SEQUENCES // world
    return step_ids(step)[rank * share : (rank + 1) * share].view(MICRO_BATCHES, -1, LENGTH, K)


def targets(step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(SEQUENCES, LENGTH, generator=generator)


def backbone() -> torch.Tensor:
    return torch.randn(K * DIM, generator=torch.Generator().manual_seed(3)).requires_grad_()


def loss_of(rows: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """rows [B, T, K, D] -> mean squared error of a bounded readout."""
    return (torch.tanh(rows.flatten(2) @ weight) - target).square().mean()


class AllFresh(Table):
    """Negative control: rows are handed out whoever may still change them."""

    def _fresh(self, step):
        return np.ones_like(super()._fresh(step))


class AskerDecides(Table):
    """Negative control: a row is fresh unless the asker itself holds it in a step in flight."""

    def _fresh(self, step):
        super()._fresh(step)
        request, self.asked = step.request, getattr(self, "asked", {})
        self.asked = {number: parts for number, parts in self.asked.items() if number in self._hazards.in_flight}
        parts = np.split(request.wanted, np.cumsum(request.wanted_counts)[:-1])
        mine = [
            np.concatenate([np.zeros(0, np.int64), *(old[asker] for old in self.asked.values())])
            for asker in range(len(parts))
        ]
        self.asked[step.number] = parts
        return ~np.concatenate([np.isin(part, held) for part, held in zip(parts, mine, strict=True)])


@dataclass
class Run:
    losses: list[float] = field(default_factory=list)
    rows: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    """Local rows at the end."""
    state: dict[str, torch.Tensor] = field(default_factory=dict)
    metrics: list[StepMetrics] = field(default_factory=list)
    lookups: list[torch.Tensor] = field(default_factory=list)
    """Looked-up rows of the first step."""
    updates: list = field(default_factory=list)
    """(global rows, gradients times scale) of every step at this owner."""


def train(
    worker: TableWorker,
    steps: int,
    prefetch: int = 1,
    kind: type[Table] = Table,
    spec: TableSpec = SPEC,
    optimizer: RowOptimizerConfig = RowOptimizerConfig(),  # noqa: B008 (frozen)
    staleness: int = 0,
    skip: tuple[int, ...] = (),
    evaluate_every: int = 0,
) -> Run:
    """Train and take everything down again. prefetch: steps begun before the running one is committed."""
    rank, world = worker.exchange.rank, worker.exchange.ranks
    run, weight = Run(), backbone()
    with opened(kind(spec, optimizer, worker, staleness=staleness, depth=max(prefetch, staleness))) as table:
        apply = table._optimizer.apply

        def recorded(store, update, first_row):
            run.updates.append((update.rows + first_row, update.summed().gradients * np.float32(update.scale)))
            apply(store, update, first_row)

        table._optimizer.apply = recorded
        tickets, begun = deque(), 0
        for step in range(steps):
            while begun <= min(step + prefetch, steps - 1):
                tickets.append(table.begin(rank_ids(begun, rank, world)))
                begun += 1
            with committed_or_skipped(tickets.popleft()) as ticket:
                working_set = ticket.result()
                target = targets(step).view(world, MICRO_BATCHES, -1, LENGTH)[rank]
                total = torch.zeros(())
                for micro in range(MICRO_BATCHES):
                    rows = working_set.lookup(micro)
                    if step == 0:
                        run.lookups.append(rows.detach().clone())
                    loss = loss_of(rows, weight, target[micro]) / MICRO_BATCHES
                    loss.backward()
                    total += loss.detach()
                if evaluate_every and step % evaluate_every == 0:
                    assert not table.evaluate(rank_ids(step + 7, rank, world)).rows.requires_grad
                _mean(worker, total)
                _mean(worker, weight.grad)
                run.losses.append(float(total))
                with torch.no_grad():
                    weight -= 0.1 * weight.grad
                weight.grad = None
                ticket.commit(scale=1 / world, learning_rate=0.05, skip=step in skip)
        run.rows = table.read_rows(table.local.start, table.local.stop)
        run.state = {name: table.store[name].clone() for name in table.store.arrays if name != "busy"}
        run.metrics = table.take_metrics()
        assert_nothing_is_left(table)
    return run


@contextmanager
def opened(table: Table) -> Iterator[Table]:
    """The table, closed at the end as `StageTables.close` does."""
    try:
        yield table
    except BaseException as error:
        # Other ranks may not have failed: jobs queued here would wait for exchanges that do not match theirs.
        table._worker.fail(error)
        raise
    finally:
        table.close()


@contextmanager
def committed_or_skipped(ticket: Ticket) -> Iterator[Ticket]:
    """The ticket, whose step is skipped if it is left without a commit."""
    try:
        yield ticket
    finally:
        if not ticket.ended:
            ticket.commit(0.0, 0.0, skip=True)


def assert_nothing_is_left(table: Table) -> None:
    table.drain()
    assert not table._open
    assert not table._unserved
    assert not table._hazards.in_flight
    assert not table._worker._promises
    assert not table._hazards.busy.any()


def _mean(worker: TableWorker, value: torch.Tensor) -> None:
    if worker.exchange.ranks > 1:
        dist.all_reduce(value)  # the default group, beside the worker's own
        value /= worker.exchange.ranks


def start_worker(world: int, timeout_seconds: float = 60.0) -> TableWorker:
    """In a rank of the pool."""
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")
    return TableWorker(Exchange(join_groups([range(world)], timeout_seconds)), 2 * timeout_seconds)


def case(world: int, runs: list[dict]) -> list[Run]:
    """Several runs in one process group."""
    worker = start_worker(world)
    results = [train(worker, **arguments) for arguments in runs]
    worker.close()
    return results


def mapped(folder: Path) -> TableSpec:
    return TableSpec("toy.memory", ROWS, DIM, store="mmap", folder=folder, init_std=0.5)
