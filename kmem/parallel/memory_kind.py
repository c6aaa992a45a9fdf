"""The training half of a kind of memory: its tables on a stage, what its layers read, what is logged and saved.

The model half (`kmem.model.memory_kind.ModelKind`) defines what the memory computes and which tables it has. `KINDS` in
`memory_kinds.py` joins the halves by the kind's name. The sections of the configuration have the same name:
`model.NAME` describes the memory, the top-level section `NAME` its tables.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch.distributed as dist

from kmem.checkpoint.commit import Commit
from kmem.checkpoint.pieces import Pieces
from kmem.config import Config, RowOptimizerConfig, TableConfig
from kmem.data.batch import SequenceBatch
from kmem.model.memory_kind import MemoryModule, ModelKind
from kmem.model.shape import Shape
from kmem.parallel.mesh import Mesh
from kmem.parallel.table_bytes import TableBytes
from kmem.tables.exchange import Exchange
from kmem.tables.table import Table, Ticket
from kmem.tables.table_spec import TableSpec
from kmem.tables.working_set import StepPlan

if TYPE_CHECKING:
    from kmem.parallel.step_context import StepContext


class StageTable(Protocol):
    """A table of a stage: its specification, and where its rows lie in checkpoints."""

    section: str
    """Name of its section in the configuration."""
    settings: TableConfig
    """That section: how the table is kept."""
    optimizer: RowOptimizerConfig | None
    """Optimizer of its rows; None if they are frozen."""
    norm_group: dist.ProcessGroup | None = None
    """Ranks over which the gradient norm is summed for clipping; None: the ranks of the stage."""
    in_forward: Exchange | None = None
    """Collectives for a table that layers look up in the forward pass, on the main thread, with a group of their own;
    None: rows are fetched before it, by the worker."""
    is_copy: bool = False
    """Whether another stage saves the same table."""

    def spec(self, config: Config) -> TableSpec:
        """The specification of the table."""

    def pieces(self, table: Table) -> dict[str, dict[str, Pieces]]:
        """Canonical name -> array (`rows`, its optimizer's state, `step`) -> this rank's part of it."""


@dataclass(frozen=True)
class MemoryPlan:
    """The look-ups of one kind in a step on this rank. The worker makes the plan, once."""

    tables: Mapping[str, StepPlan]
    """Table -> its rows, and the look-ups of each micro-batch."""
    beside: Sequence[Any] = ()
    """For each micro-batch, the data that layers need besides rows: an object with `to(device)`."""


@dataclass
class BegunStep:
    """The micro-batches of a step on this rank, whose rows are being fetched."""

    micro_batches: list[SequenceBatch]
    plans: dict[str, Callable[[], MemoryPlan]] = field(default_factory=dict)
    """Kind -> function that gives its plan. The thread that asks first makes it: the worker."""
    tickets: dict[str, Ticket] = field(default_factory=dict)
    """Table of this stage -> its ticket."""


@dataclass(frozen=True)
class StageParts:
    """The parts of this rank's stage that a kind needs."""

    config: Config
    shape: Shape
    mesh: Mesh
    context: "StepContext"
    modules: Mapping[str, Mapping[int, MemoryModule]]
    """Kind -> layer of this stage -> its module."""


class StageMemory:
    """One kind of memory on this rank's stage. The stage may have no layers with this memory."""

    kind: str
    tables: Sequence[StageTable] = ()
    layers: Sequence[int] = ()
    """Layers of this stage that have the memory."""

    def start(self, tables: Mapping[str, Table]) -> None:
        """Called once the stage's tables, here by name, are allocated."""

    def plan(self, micro_batches: Sequence[SequenceBatch], control: str | None = None) -> MemoryPlan:
        """Plan the look-ups of these micro-batches, on the host. Called by the worker.

        Args:
            control: one of the kind's controls, other than "off"; default: as in training.
        """
        raise NotImplementedError

    def read(self, layer: int, context: "StepContext") -> Any:
        """The input of a layer's memory for the running micro-batch: the `read` argument of its `MemoryModule`."""
        raise NotImplementedError

    def finite(self) -> bool:
        """Whether the gradients of rows that layers looked up in the forward pass are finite on this rank."""
        return True

    def commit(self, scale: float, learning_rate: float) -> None:
        """Update the rows of tables that layers looked up in the forward pass; the others are updated by the worker.
        Called on all ranks, before weights change.

        Args:
            scale: factor on the summed gradients of all ranks.
            learning_rate: of the backbone.
        """

    def close_step(self, step: BegunStep, sampled: bool) -> dict[str, dict[str, Any]]:
        """Figures of a step over all ranks, by layer or level, as plain data. Collective over the world.

        Args:
            sampled: also collect figures that are too costly for every step. The same on all ranks.
        """
        raise NotImplementedError

    def state(self, saving: bool) -> dict[str, Pieces]:
        """State in checkpoints besides rows and their optimizer state: this rank's pieces, to save or to load into.
        Collective over the world when saving."""
        return {}


class MemoryKind:
    """The training half of a kind."""

    model: ModelKind
    """The model half."""

    @property
    def name(self) -> str:
        return self.model.name

    @property
    def training_controls(self) -> tuple[str, ...]:
        """Controls that a held-out evaluation can use during training."""
        return self.model.controls

    # Before a run starts

    def prepare(self, config: Config, tokenizer: Path) -> Any:
        """Prepare what the kind needs beyond the configuration, such as the addresses of a vocabulary. Every rank makes
        its own copy, and all are equal.

        Raises:
            UserError: names the field and the remedy.
        """
        return None

    def manifest(self, prepared: Any) -> dict[str, Any] | None:
        """What maps text to rows. Checkpoints hold it, because rows are meaningless without it."""
        return None

    def copied_folders(self, config: Config, run: Path) -> dict[str, Path]:
        """Name in the run folder -> folder to copy there when the run starts, unless the copy exists. Exports read
        these copies."""
        return {}

    def training_batch(self, config: Config, batch: SequenceBatch, samples: Sequence[int], step: int) -> SequenceBatch:
        """A training batch as this kind reads it. It depends only on the configuration and these arguments.

        Args:
            samples: global numbers of the batch's sequences.
            step: number of optimizer steps done before it.
        """
        return batch

    # On a stage

    def stage(self, parts: StageParts, prepared: Any) -> StageMemory:
        """The memory on this rank's stage. Collective over the world, including stages without its layers."""
        raise NotImplementedError

    def settings(self, config: Config) -> TableConfig:
        """How its tables are kept: the top-level section with its name."""
        return getattr(config, self.name)

    def optimizer(self, config: Config) -> RowOptimizerConfig | None:
        """The optimizer of its rows; None if they are frozen with the rest of the model."""
        return None if config.model.frozen_anchor else self.settings(config).optimizer

    # Checkpoints; `kmem.train.load_plan` acts on these

    restarts_backbone_optimizer: bool = False
    """Whether adding the memory to a model restarts the backbone's optimizer. It must if layers get new parameters:
    Adam counts one step for all parameters, and its corrections would make the steps of new parameters too long."""
    draws_added_rows: bool = False
    """Whether rows of an added memory are drawn as in a new run; they stay zeros otherwise."""

    def check_added(self, config: Config, folder: Path) -> None:
        """Refuse to add the memory to a checkpoint without it if that would change what the model computes.

        Raises:
            CheckpointError: names the field and the remedy.
        """

    def origin(self, config: Config, stored: Commit | None, folder: Path | None, weights_only: bool) -> dict[str, Any]:
        """The origin of the run's rows, as checkpoints record it, given the checkpoint that the run begins with."""
        return {}

    def partial_tensors(self, config: Config) -> set[str]:
        """Names of tensors that the ranks hold only in part. Checkpoints of the run hold the same parts."""
        return set()

    def check_manifest(self, folder: Path, stored: dict[str, Any], prepared: Any, hint: str) -> None:
        """Refuse rows that would be read for other text than they were trained with.

        Args:
            stored: the manifest of a checkpoint.
            hint: remedy for a user who means another model than the checkpoint's.

        Raises:
            CheckpointError: names every field that differs, and the remedy.
        """

    def check_stored(self, folder: Path, commit: Commit, config: Config, own_run: bool) -> None:
        """Refuse a checkpoint that lacks rows of the run, or whose additional rows the run's checkpoints would lose.

        Args:
            own_run: whether it is a checkpoint of this run, which later checkpoints replace.

        Raises:
            CheckpointError: names the field and the remedy.
        """

    def compared(self, section: dict[str, Any]) -> dict[str, Any]:
        """The fields of `model.NAME` that must be equal in a checkpoint and a run. Fields that only shape training are
        left out later."""
        return section

    # Dry run

    def table_bytes(self, config: Config, mesh: Mesh, layers: Sequence[int]) -> list[TableBytes]:
        """Costs of its tables on the stage with these layers."""
        raise NotImplementedError

    def imagined_read(self, config: Config, layer: int) -> Any:
        """The `read` argument of a layer's `MemoryModule` for a micro-batch of whole sequences, in meta tensors, from
        which follows what the layer computes and keeps. Called on the meta device."""
        raise NotImplementedError
