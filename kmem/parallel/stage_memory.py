"""The tables of a stage's memory layers through a step: begun ahead, looked up, committed or skipped.

Every rank of a stage owns a range of each table's rows. The ids of a step follow from its tokens, which every stage
reads for itself, so rows are fetched while earlier steps are computed.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from kmem.checkpoint.pieces import Pieces
from kmem.config import Config, UserError
from kmem.data.batch import SequenceBatch
from kmem.memory.exchange import Exchange, join_groups
from kmem.memory.table import Table, TableSpec, Ticket
from kmem.memory.worker import MemoryWorker
from kmem.memory.working_set import WorkingSet
from kmem.model.engram_memory import EngramAddresses, table_name
from kmem.parallel.mesh import Mesh, gather


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

    Raises:
        UserError: a table does not fit its store; on every rank alike, with the numbers.
    """

    def __init__(
        self, config: Config, mesh: Mesh, addresses: EngramAddresses, layers: Sequence[int], device: torch.device
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
        problem = None
        if layers:
            # A lost rank shows in the group first, with a better message than a job that never ends.
            self._worker = MemoryWorker(Exchange(group), seconds + 60.0)
            try:
                for layer in layers:
                    self.tables[layer] = self._table(config, layer, self._worker, device)
            except UserError as error:
                problem = str(error)
        if mesh.world > 1:
            problem = next((found for found in gather(problem) if found), None)
        if problem is not None:
            self.close()
            raise UserError(problem)

    def _table(self, config: Config, layer: int, worker: MemoryWorker, device: torch.device) -> Table:
        engram, memory = config.model.engram, config.memory
        assert engram is not None
        assert engram.row_dim is not None
        folder = None
        if memory.store == "mmap":
            folder = mapped_folder(config)
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"memory.folder: {folder} cannot be made ({error.strerror})") from error
        addressing = self.addresses.addressing
        spec = TableSpec(
            table_name(layer),
            addressing.padded_rows(addressing.layers.index(layer)),
            engram.row_dim,
            memory.dtype,
            memory.store,
            folder,
            config.train.init_seed,
            engram.init_std,
        )
        return Table(spec, memory.optimizer, worker, device, memory.staleness, memory.prefetch_depth, memory.threads)

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


def mapped_folder(config: Config) -> Path:
    """Where the mapped tables of a run lie; local to the machine."""
    if config.memory.folder is None:
        return Path(config.folder) / config.name / "memory"
    return Path(os.path.expanduser(config.memory.folder)) / config.name


def finite(working_sets: Mapping[int, WorkingSet]) -> bool:
    """Whether no row gradient of this rank is infinite or NaN."""
    flags = [working_set.finite() for working_set in working_sets.values()]
    return bool(torch.stack(flags).all()) if flags else True
