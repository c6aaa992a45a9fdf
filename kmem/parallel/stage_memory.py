"""The tables of a stage's memory layers through a step: begun ahead, looked up, committed or skipped.

Every rank of a stage owns a range of each table's rows. The ids of a step follow from its tokens, which every stage
reads for itself, so rows are fetched while earlier steps are computed.
"""

import os
import socket
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import wait
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from kmem.checkpoint.pieces import Pieces
from kmem.config import Config, UserError
from kmem.data.batch import SequenceBatch
from kmem.memory.exchange import Exchange, join_groups
from kmem.memory.stores import StoreError, available_host_memory, gib
from kmem.memory.table import Table, TableSpec, Ticket, row_bytes
from kmem.memory.worker import MemoryWorker
from kmem.memory.working_set import WorkingSet
from kmem.model.engram_memory import EngramAddresses, table_name
from kmem.parallel.mesh import Mesh, any_rank, gather


@dataclass
class BegunStep:
    """The micro-batches of a step on this rank, whose rows are on their way."""

    micro_batches: list[SequenceBatch]
    tickets: dict[int, Ticket] = field(default_factory=dict)
    """By layer, of this stage's tables."""


class StageMemory:
    """The tables of this stage, one worker thread for all of them. Every rank of the world builds one.

    Args:
        addresses: of the model.
        layers: those of this stage that have a memory, ascending; may be none.
        initialise: draw the first rows; False where a checkpoint will be loaded.

    Raises:
        UserError: a table does not fit its store; on every rank alike, with the numbers.
    """

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        addresses: EngramAddresses,
        layers: Sequence[int],
        device: torch.device,
        initialise: bool = True,
    ) -> None:
        assert config.model.engram is not None
        self.addresses = addresses
        self._optimizer = config.memory.optimizer
        self._scale = 1.0 / mesh.data
        self.tables: dict[int, Table] = {}
        self._worker: MemoryWorker | None = None
        seconds = config.parallel.timeout_seconds
        stages = [range(stage * mesh.data, (stage + 1) * mesh.data) for stage in range(mesh.pipeline)]
        group = join_groups(stages, seconds)  # by every rank, also of stages without a memory
        if layers:
            # A lost rank shows in the group first, with a better message than a job that never ends.
            self._worker = MemoryWorker(Exchange(group), seconds + 60.0)
        try:
            self._build(config, layers, device)
            if initialise:
                self._initialise()
        except BaseException as error:
            self.close(error)
            raise

    def _build(self, config: Config, layers: Sequence[int], device: torch.device) -> None:
        """Allocate all tables of the world, or none."""
        specs = [self._spec(config, layer) for layer in layers]
        _agree(lambda: _check_host_memory(config, specs, self._scale))
        memory, worker = config.memory, self._worker

        def build() -> None:
            for layer, spec in zip(layers, specs, strict=True):
                assert worker is not None
                if spec.folder is not None:
                    try:
                        spec.folder.mkdir(parents=True, exist_ok=True)
                    except OSError as error:
                        raise UserError(f"memory.folder: {spec.folder} cannot be made ({error.strerror})") from error
                self.tables[layer] = Table(
                    spec, memory.optimizer, worker, device, memory.staleness, memory.prefetch_depth, memory.threads,
                    initialise=False,
                )  # fmt: skip

        _agree(build)

    def _initialise(self) -> None:
        """Draw the first rows of all tables, however long that takes: ranks that are through with theirs, or have none,
        wait in short collectives, none of which meets its timeout."""
        jobs = [self._worker.submit(table.initialise) for table in self.tables.values() if self._worker is not None]
        waiting = True
        while waiting:
            done, _ = wait(jobs, timeout=1.0)
            (waiting,) = any_rank([len(done) < len(jobs)])
        for job in jobs:
            job.result()

    def _spec(self, config: Config, layer: int) -> TableSpec:
        engram, memory = config.model.engram, config.memory
        assert engram is not None
        assert engram.row_dim is not None
        addressing = self.addresses.addressing
        return TableSpec(
            table_name(layer),
            addressing.padded_rows(addressing.layers.index(layer)),
            engram.row_dim,
            memory.dtype,
            memory.store,
            mapped_folder(config) if memory.store == "mmap" else None,
            config.train.init_seed,
            engram.init_std,
        )

    def begin(self, micro_batches: Sequence[SequenceBatch]) -> BegunStep:
        """Start fetching the rows of a step; all ranks of the stage begin the same steps in the same order."""
        batches = list(micro_batches)
        tickets = {layer: table.begin(self._ids(layer, batches)) for layer, table in self.tables.items()}
        return BegunStep(batches, tickets)

    def activate(self, step: BegunStep) -> dict[int, WorkingSet]:
        """Wait for a step's rows; the step before must have been committed or skipped."""
        return {layer: ticket.result() for layer, ticket in step.tickets.items()}

    def commit(self, step: BegunStep, learning_rate: float) -> None:
        """Queue the update of a step's rows. `learning_rate` is the backbone's."""
        for ticket in step.tickets.values():
            ticket.commit(self._scale, learning_rate * self._optimizer.lr_multiplier)

    def evaluate(self, micro_batches: Sequence[SequenceBatch]) -> dict[int, WorkingSet]:
        """Read-only rows as the last commit left them; steps in flight do not notice."""
        return {layer: table.evaluate(self._ids(layer, micro_batches)()) for layer, table in self.tables.items()}

    def pieces(self) -> dict[str, dict[str, Pieces]]:
        """Name of a table -> array (`rows`, its optimizer's state, `step`) -> this rank's part of it."""
        return {table.spec.name: table.pieces() for table in self.tables.values()}

    def close(self, error: BaseException | None = None) -> None:
        """Skip what is in flight and give back the memory. After an error that other ranks may not share, nothing is
        exchanged any more."""
        if self._worker is None:
            return
        if error is not None:
            self._worker.fail(error)
        for table in self.tables.values():
            table.close()
        self._worker.close()
        self._worker = None

    def _ids(self, layer: int, batches: Sequence[SequenceBatch]) -> Callable[[], Tensor]:
        """Row ids [M, B, T, K], computed where the function is called: by the worker, beside the running step."""

        def ids() -> Tensor:
            tokens, documents = (
                torch.cat([getattr(batch, name) for batch in batches]) for name in ("input_ids", "document_ids")
            )
            return self.addresses.row_ids(layer, tokens, documents).unflatten(0, (len(batches), -1))

        return ids


def _agree(action: Callable[[], None]) -> None:
    """Do something on every rank; if it fails on one, all of them raise its message. Collective over the world."""
    problem = None
    try:
        action()
    except UserError as error:
        problem = str(error)
    problem = next((found for found in gather(problem) if found), None)
    if problem is not None:
        raise UserError(problem)


def _check_host_memory(config: Config, specs: Sequence[TableSpec], share: float) -> None:
    """Refuse tables that the ranks of a machine together have no memory for: each alone might fit.

    Args:
        share: of a table's rows that a rank holds.
    """
    bytes_of_rank = 0
    if config.memory.store == "host":
        bytes_of_rank = sum(int(spec.rows * share) * row_bytes(spec, config.memory.optimizer) for spec in specs)
    everyone: list[tuple[str, int]] = [("", 0)] * dist.get_world_size()
    dist.all_gather_object(everyone, (socket.gethostname(), bytes_of_rank))
    needed = sum(size for host, size in everyone if host == socket.gethostname())
    available = available_host_memory()
    if needed > available:
        raise StoreError(
            f"memory.store: the tables of this machine's ranks need {gib(needed)} of host memory for rows and their "
            f"optimizer state, and {gib(int(available))} are available on {socket.gethostname()}; use more machines, "
            "fewer rows, memory.dtype=bf16 or memory.store=mmap"
        )


def mapped_folder(config: Config) -> Path:
    """Where the mapped tables of a run lie; local to the machine."""
    if config.memory.folder is None:
        return Path(config.folder) / config.name / "memory"
    return Path(os.path.expanduser(config.memory.folder)) / config.name


def finite(working_sets: Mapping[int, WorkingSet]) -> bool:
    """Whether no row gradient of this rank is infinite or NaN."""
    flags = [working_set.finite() for working_set in working_sets.values()]
    return bool(torch.stack(flags).all()) if flags else True
