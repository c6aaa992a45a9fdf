"""The tables of a stage in the course of a step: begun ahead, looked up, committed or skipped.

Every rank of a stage owns a range of each table's rows. The batches of a step determine its row ids, and every stage
reads the batches itself, so rows are fetched while earlier steps are computed. Tables that layers look up in the
forward pass (`StageTable.in_forward`) are only kept here: their memory reads and updates them on the main thread.
"""

import os
import socket
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from kmem.checkpoint.pieces import Pieces
from kmem.config import Config, TableConfig, UserError
from kmem.data.batch import SequenceBatch
from kmem.parallel.memory_kind import BegunStep, MemoryPlan, StageMemory, StageTable
from kmem.parallel.mesh import Mesh, any_rank, run_on_all_ranks
from kmem.tables.exchange import Exchange, join_groups
from kmem.tables.stores import StoreError, available_host_memory, gib
from kmem.tables.table import Table
from kmem.tables.table_spec import TableSpec, row_bytes
from kmem.tables.worker import InlineWorker, TableWorker
from kmem.tables.working_set import StepPlan, WorkingSet


@dataclass
class LookedUp:
    """The look-ups of a stage's memories for the micro-batches of a step."""

    working_sets: dict[str, WorkingSet] = field(default_factory=dict)
    """Table -> its working set."""
    beside: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Kind -> for each micro-batch, the data that layers need besides rows, on the host."""
    controls: Mapping[str, str] = field(default_factory=dict)
    """Kind -> control that replaces what training reads."""


class StageTables:
    """The tables of this stage, with one worker thread for all of them. Every rank of the world builds one. Without
    memories it has no tables and does nothing.

    Args:
        memories: memories of this stage, in the same order on all its ranks; they may have no tables.
        initialise: draw the initial rows; False if a checkpoint will be loaded.

    Raises:
        UserError: a table does not fit its store; on all ranks alike, with the numbers.
    """

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        memories: Sequence[StageMemory],
        device: torch.device,
        initialise: bool = True,
    ) -> None:
        self._scale = 1.0 / mesh.data
        self.memories = list(memories)
        self.tables: dict[str, Table] = {}
        """Name -> table."""
        self._of: dict[str, tuple[StageMemory, StageTable]] = {}
        self._ahead: list[BegunStep] = []
        """Steps that are begun and not yet active. Tables with a smaller depth may not have begun them."""
        self._worker: TableWorker | None = None
        if memories:
            seconds = config.parallel.timeout_seconds
            stages = [range(stage * mesh.data, (stage + 1) * mesh.data) for stage in range(mesh.pipeline)]
            group = join_groups(stages, seconds)  # by every rank, including stages without tables
            if any(memory.tables for memory in memories):
                # The group notices a lost rank first, with a better message than a job that never ends.
                self._worker = TableWorker(Exchange(group), seconds + 60.0)
        try:
            self._build(config, device)
            for memory in memories:
                memory.start(self.tables)
            if initialise:
                self.initialise()
        except BaseException as error:
            self.close(error)
            raise

    def _build(self, config: Config, device: torch.device) -> None:
        """Allocate all tables of the world, or none."""
        planned = [(table.spec(config), memory, table) for memory in self.memories for table in memory.tables]
        run_on_all_ranks(lambda: _check_machines([(spec, table) for spec, _, table in planned], self._scale))
        worker = self._worker

        def build() -> None:
            if device.type == "cuda":
                torch.cuda.set_device(device)  # each thread has its own
            for spec, memory, table in planned:
                assert worker is not None
                own = worker if table.in_forward is None else InlineWorker(table.in_forward)
                if spec.folder is not None:
                    try:
                        spec.folder.mkdir(parents=True, exist_ok=True)
                    except OSError as error:
                        problem = f"{table.section}.folder: {spec.folder} cannot be created ({error.strerror})"
                        raise UserError(problem) from error
                settings = table.settings
                self._of[spec.name] = memory, table
                self.tables[spec.name] = Table(
                    spec, table.optimizer, own, device, settings.staleness, settings.prefetch_depth,
                    settings.threads, initialise=False, norm_group=table.norm_group,
                )  # fmt: skip

        with ThreadPoolExecutor(1, "allocation") as thread:  # the main thread keeps waiting ranks from their timeouts
            job = thread.submit(build)
            _wait_together([job])
        run_on_all_ranks(job.result)

    def initialise(self, kinds: Collection[str] | None = None) -> None:
        """Draw the initial rows of all tables, or of the tables of some kinds, however long that takes."""
        tables = [table for name, table in self.tables.items() if kinds is None or self._of[name][0].kind in kinds]
        jobs = [self._worker.submit(table.initialise) for table in tables if self._worker is not None]
        _wait_together(jobs)
        for job in jobs:
            job.result()

    def count_updates(self) -> None:
        """Set the counts of rows that count their updates, after loading a checkpoint without counts; see
        `Table.count_updates`."""
        for name, table in self.tables.items():
            optimizer = self._of[name][1].optimizer
            if optimizer is not None and optimizer.counts_updates:
                table.count_updates()

    def begin(self, micro_batches: Sequence[SequenceBatch]) -> BegunStep:
        """Start fetching the rows of a step. All ranks of the stage begin the same steps in the same order. A table
        whose depth is less than the number of steps begun starts later."""
        step = BegunStep(list(micro_batches))
        step.plans = {memory.kind: cache(partial(memory.plan, step.micro_batches)) for memory in self.memories}
        self._ahead.append(step)
        self._fetch_ahead()
        return step

    def _fetch_ahead(self) -> None:
        for name, table in self._fetched.items():
            for step in self._ahead:
                if name not in step.tickets and table.in_flight <= table.depth:
                    step.tickets[name] = table.begin(self._plan(name, step.plans))

    def activate(self, step: BegunStep) -> LookedUp:
        """Wait for a step's rows; the step before must have been committed or skipped."""
        self._fetch_ahead()
        assert self._ahead[0] is step, "steps are trained in the order in which they are begun"
        del self._ahead[0]
        working_sets = {name: ticket.result() for name, ticket in step.tickets.items()}
        return LookedUp(working_sets, self._beside(step.plans))

    def commit(self, step: BegunStep, learning_rate: float) -> None:
        """Queue the update of a step's rows, except in frozen tables. `learning_rate` is the backbone's."""
        for name, ticket in step.tickets.items():
            optimizer = self._of[name][1].optimizer
            rate = 0.0 if optimizer is None else learning_rate * optimizer.lr_multiplier
            ticket.commit(self._scale, rate, skip=optimizer is None)
        for memory in self.memories:
            memory.commit(self._scale, learning_rate)

    def evaluate(self, micro_batches: Sequence[SequenceBatch], controls: Mapping[str, str]) -> LookedUp:
        """Look up read-only rows as the last commit left them. Steps in flight are not affected.

        Args:
            controls: kind -> control that replaces what training reads.
        """
        off = {kind for kind, control in controls.items() if control == "off"}
        plans = {
            memory.kind: cache(partial(memory.plan, micro_batches, controls.get(memory.kind)))
            for memory in self.memories
            if memory.kind not in off
        }
        working_sets = {
            name: table.evaluate(self._plan(name, plans))
            for name, table in self._fetched.items()
            if self._of[name][0].kind in plans
        }
        return LookedUp(working_sets, self._beside(plans), controls)

    def _plan(self, name: str, plans: Mapping[str, Callable[[], MemoryPlan]]) -> Callable[[], StepPlan]:
        """A function that gives the plan of a table; the worker calls it while an earlier step runs."""
        return lambda: plans[self._of[name][0].kind]().tables[name]

    def _beside(self, plans: Mapping[str, Callable[[], MemoryPlan]]) -> dict[str, Sequence[Any]]:
        """Kind -> for each micro-batch, the data that layers need besides rows."""
        return {
            memory.kind: plans[memory.kind]().beside
            for memory in self.memories
            if memory.tables and memory.kind in plans
        }

    @property
    def _fetched(self) -> dict[str, Table]:
        """Tables whose rows are fetched before the forward pass."""
        return {name: table for name, table in self.tables.items() if self._of[name][1].in_forward is None}

    def pieces(self, saving: bool = False) -> dict[str, dict[str, Pieces]]:
        """Canonical name -> array (`rows`, its optimizer's state, `step`) -> this rank's part of it.

        Args:
            saving: leave out copies that another stage saves.
        """
        pieces: dict[str, dict[str, Pieces]] = {}
        for name, table in self.tables.items():
            described = self._of[name][1]
            if not (saving and described.is_copy):
                pieces |= described.pieces(table)
        return pieces

    def close(self, error: BaseException | None = None) -> None:
        """Skip the steps in flight and release the memory. After an error that other ranks may not share, nothing is
        exchanged any more."""
        if self._worker is None:
            return
        if error is not None:
            self._worker.fail(error)
        for table in self.tables.values():
            table.close()
        self._worker.close()
        self._worker = None


def _wait_together(jobs: Sequence[Future[Any]]) -> None:
    """Wait for the jobs of all ranks, however long they take: ranks that have none, or have finished, wait in short
    collectives, none of which runs into its timeout. Collective over the world."""
    waiting = True
    while waiting:
        done, _ = wait(jobs, timeout=1.0)
        (waiting,) = any_rank([len(done) < len(jobs)])


def _check_machines(planned: Sequence[tuple[TableSpec, StageTable]], share: float) -> None:
    """Refuse tables that do not fit into host memory together with the tables of the machine's other ranks, and mapped
    files in a folder that several machines share.

    Args:
        share: share of a table's rows that one rank holds.
    """
    bytes_of_rank = sum(
        int(spec.rows * share) * row_bytes(spec, table.optimizer) for spec, table in planned if spec.store == "host"
    )
    sections = sorted({table.section for _, table in planned})
    everyone: list[tuple[str, int]] = [("", 0)] * dist.get_world_size()
    dist.all_gather_object(everyone, (socket.gethostname(), bytes_of_rank))
    machines = len({host for host, _ in everyone})
    shared = sorted(
        {table.section for _, table in planned if table.settings.store == "mmap" and not table.settings.folder}
    )
    if machines > 1 and shared:
        raise StoreError(
            f"{shared[0]}.folder: the run folder is shared by {machines} machines, and mapped tables belong on a disk "
            "of their own machine; name a local folder"
        )
    needed = sum(size for host, size in everyone if host == socket.gethostname())
    available = available_host_memory()
    if needed > available:
        raise StoreError(
            f"{' and '.join(f'{name}.store' for name in sections)}: the tables of this machine's ranks need "
            f"{gib(needed)} of host memory for rows and their optimizer state, and {gib(int(available))} are available "
            f"on {socket.gethostname()}; use more machines, fewer rows, dtype=bf16 or store=mmap"
        )


def mapped_folder(config: Config, settings: TableConfig, section: str) -> Path:
    """Folder of the mapped tables of a section of the configuration; local to the machine."""
    if settings.folder is None:
        return Path(config.folder) / config.name / section
    return Path(os.path.expanduser(settings.folder)) / config.name
