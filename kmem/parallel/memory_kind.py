"""The training half of a kind of memory: its tables on a stage, what its layers read, what is logged and saved.

The model half (`kmem.model.memory_kind.ModelKind`) says what the memory computes and which tables it has. `KINDS` in
`memory_kinds.py` joins the halves by the kind's name, which is that of its sections in the configuration:
`model.NAME` is the memory, and the top-level section `NAME` says how its tables are kept.
"""

from collections.abc import Mapping, Sequence
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
from kmem.tables.table import Table, Ticket
from kmem.tables.table_spec import TableSpec
from kmem.tables.working_set import StepPlan

if TYPE_CHECKING:
    from kmem.parallel.step_context import StepContext


class StageTable(Protocol):
    """A table of a stage: what it is, and where its rows lie in checkpoints."""

    section: str
    """Name of its section of the configuration."""
    settings: TableConfig
    """How it is kept."""
    optimizer: RowOptimizerConfig | None
    """Of its rows; None where they are frozen."""
    norm_group: dist.ProcessGroup | None
    """Ranks over which the norm of a gradient that is clipped is summed; None: the ranks of the stage."""

    def spec(self, config: Config) -> TableSpec:
        """The table."""

    def pieces(self, table: Table) -> dict[str, dict[str, Pieces]]:
        """Canonical name -> array (`rows`, its optimizer's state, `step`) -> this rank's part of it."""


@dataclass(frozen=True)
class MemoryPlan:
    """What a kind looks up in a step on this rank. The worker makes it, once."""

    tables: Mapping[str, StepPlan]
    """Table -> its rows and, for each micro-batch, the look-ups."""
    beside: Sequence[Any] = ()
    """For each micro-batch, what layers need besides rows: an object with `to(device)`."""


@dataclass
class BegunStep:
    """The micro-batches of a step on this rank, whose rows are on their way."""

    micro_batches: list[SequenceBatch]
    plans: dict[str, "PlanOnce"] = field(default_factory=dict)
    """By kind."""
    tickets: dict[str, Ticket] = field(default_factory=dict)
    """By table of this stage."""


class PlanOnce:
    """The plan of one kind for one step, made by the thread that asks first: the worker."""

    def __init__(self, memory: "StageMemory", micro_batches: Sequence[SequenceBatch], control: str | None = None):
        self._arguments = memory, micro_batches, control
        self._plan: MemoryPlan | None = None

    def __call__(self) -> MemoryPlan:
        if self._plan is None:
            memory, micro_batches, control = self._arguments
            self._plan = memory.plan(micro_batches, control)
        return self._plan


@dataclass(frozen=True)
class StageParts:
    """What a kind needs to know of this rank's stage."""

    config: Config
    shape: Shape
    mesh: Mesh
    context: "StepContext"
    modules: Mapping[str, Mapping[int, MemoryModule]]
    """Kind -> layer of this stage -> its module."""


class StageMemory:
    """One kind of memory on this rank's stage, which may have none of its layers."""

    kind: str
    tables: Sequence[StageTable] = ()
    layers: Sequence[int] = ()
    """Of this stage."""

    def start(self, tables: Mapping[str, Table]) -> None:
        """The tables of the stage, by name, are allocated."""

    def plan(self, micro_batches: Sequence[SequenceBatch], control: str | None = None) -> MemoryPlan:
        """What the tables look up for these micro-batches, on the host. Called by the worker.

        Args:
            control: one of the kind's controls, other than "off"; default: what training reads.
        """
        raise NotImplementedError

    def read(self, layer: int, context: "StepContext") -> Any:
        """What a layer of this stage reads for the running micro-batch: the `read` of its `MemoryModule`."""
        raise NotImplementedError

    def close_step(self, step: BegunStep, sampled: bool) -> dict[str, dict[str, Any]]:
        """Figures of a step over all ranks, by layer or level, as plain data. Collective over the world, which agrees
        on `sampled`: whether to collect also what is too costly for every step."""
        raise NotImplementedError

    def state(self, saving: bool) -> dict[str, Pieces]:
        """What checkpoints hold besides rows and the state of their optimizer: this rank's part, to be saved or to be
        loaded into. Collective over the world when saving."""
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
        """Controls that a held-out evaluation can give while training."""
        return self.model.controls

    # Before a run starts

    def prepare(self, config: Config, tokenizer: Path) -> Any:
        """What the kind needs beyond the configuration, such as the addresses of a vocabulary. Every rank makes its own
        and gets the same.

        Raises:
            UserError: names the field and the remedy.
        """
        return None

    def manifest(self, prepared: Any) -> dict[str, Any] | None:
        """What decides which text reads which row. Checkpoints hold it; without it rows mean nothing."""
        return None

    def copied_folders(self, config: Config, run: Path) -> dict[str, Path]:
        """Name in the run folder -> the folder that is copied there when the run starts, where the copy is not there
        already. Exports find it in the run folder."""
        return {}

    def training_batch(self, config: Config, batch: SequenceBatch, samples: Sequence[int], step: int) -> SequenceBatch:
        """A training batch as this kind reads it, a function of the configuration and these numbers alone.

        Args:
            samples: global numbers of the batch's sequences.
            step: optimizer steps done.
        """
        return batch

    # On a stage

    def stage(self, parts: StageParts, prepared: Any) -> StageMemory:
        """The memory on this rank's stage. Collective over the world, also of stages without its layers."""
        raise NotImplementedError

    def settings(self, config: Config) -> TableConfig:
        """How its tables are kept: the top-level section of its name."""
        return getattr(config, self.name)

    def optimizer(self, config: Config) -> RowOptimizerConfig | None:
        """Of its rows; None where they are frozen with the rest of the model."""
        return self.settings(config).optimizer

    # Checkpoints; `kmem.train.load_plan` has what follows from these

    restarts_backbone_optimizer: bool = False
    """Whether a model to which the memory is added trains with a new optimizer. It must where layers get parameters:
    Adam counts the steps of all parameters together, and its corrections would make the steps of new ones too long."""
    draws_added_rows: bool = False
    """Whether rows of an added memory are drawn as those of a new run are, and not left as zeros."""

    def check_added(self, config: Config, folder: Path) -> None:
        """Refuse to add the memory to a checkpoint without it where that would change what the model computes.

        Raises:
            CheckpointError: names the field and the remedy.
        """

    def origin(self, config: Config, stored: Commit | None, folder: Path | None, weights_only: bool) -> dict[str, Any]:
        """What checkpoints remember of where the run's rows come from, given the checkpoint that it begins with."""
        return {}

    def partial_tensors(self, config: Config) -> set[str]:
        """Names of tensors of which the ranks hold a part only, which is all that checkpoints of the run have."""
        return set()

    def check_manifest(self, folder: Path, stored: dict[str, Any], prepared: Any, hint: str) -> None:
        """Refuse rows that would be read for other text than they were trained with.

        Args:
            stored: the manifest of a checkpoint.
            hint: what to do where another model than the checkpoint's is meant.

        Raises:
            CheckpointError: names every field that differs, and the remedy.
        """

    def check_stored(self, folder: Path, commit: Commit, config: Config, own_run: bool) -> None:
        """Refuse a checkpoint that lacks rows of the run, or that the run's own checkpoints would lose rows of.

        Args:
            own_run: whether it is a checkpoint of this run, which later ones replace.

        Raises:
            CheckpointError: names the field and the remedy.
        """

    def compared(self, section: dict[str, Any]) -> dict[str, Any]:
        """The fields of `model.NAME` that a checkpoint and a run must have in common. Fields that only shape training
        are left out later."""
        return section

    # Dry run

    def table_bytes(self, config: Config, mesh: Mesh, layers: Sequence[int]) -> list[TableBytes]:
        """Its tables on the stage of these layers."""
        raise NotImplementedError

    def activation_values(self, config: Config, layer: int) -> int:
        """Values that a layer with this memory keeps per token for the backward pass: an estimate."""
        return 0
