"""How lookup tables are kept and trained."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from kmem.config.section import Section

Beta = Annotated[float, Field(ge=0, lt=1)]

RowOptimizerName = Literal["lazy_adam", "adam_catchup", "rowwise_adagrad", "sinkhorn_momentum"]


@dataclass(frozen=True)
class RowOptimizerTraits:
    """Properties of a row optimizer that the configuration depends on; its class is in `kmem.tables.row_optimizers`."""

    by_value: bool = False
    """Every value is trained on its own; the values of a row share no number."""
    counts_missed_steps: bool = False
    """A row knows how many steps it has missed, so its weights can decay for them."""
    counts_own_updates: bool = False
    """If a row is a parameter of its own, its bias correction counts its own updates."""
    balances: bool = False
    """Normalises rows and columns in turn, over all rows or over the rows of the step."""


ROW_OPTIMIZER_TRAITS: dict[RowOptimizerName, RowOptimizerTraits] = {
    "lazy_adam": RowOptimizerTraits(by_value=True, counts_own_updates=True),
    "adam_catchup": RowOptimizerTraits(by_value=True, counts_missed_steps=True),
    "rowwise_adagrad": RowOptimizerTraits(),
    "sinkhorn_momentum": RowOptimizerTraits(balances=True),
}


def _names(have: Callable[[RowOptimizerTraits], bool]) -> str:
    return " or ".join(name for name, traits in ROW_OPTIMIZER_TRAITS.items() if have(traits))


class RowOptimizerConfig(Section):
    """The optimizer of table rows. Rows outside a step's working set never move, unless the optimizer is dense."""

    name: RowOptimizerName = "lazy_adam"
    """lazy_adam: Adam on the rows that a step touches. adam_catchup: the same, but moments first decay for the steps
    that a row has missed. rowwise_adagrad: one number of state per row. sinkhorn_momentum: balanced momentum
    (DeepSeek-V4.1)."""
    lr_multiplier: PositiveFloat = 5.0
    """Factor on the learning rate of the step (5 in the paper)."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Adam: decay rates of the first and second moments."""
    eps: PositiveFloat = 1e-8
    """Adam and Adagrad: added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled decay. It needs adam_catchup, which knows how many steps a row has missed. The blocks of a bank can
    also use it with lazy_adam: they decay in the steps that fetch them."""
    clip_norm: PositiveFloat | None = None
    """Largest 2-norm of a table's gradient in a step, over all ranks; a table of a bank holds the blocks of one level
    in all layers. The backbone's norm does not include rows."""
    stochastic_rounding: bool = False
    """Round bf16 rows up or down at random, in proportion, so that small updates are not lost."""
    dense: bool = True
    """sinkhorn_momentum: true moves every row that has momentum, as published; false moves only the working set."""
    momentum: Beta = 0.95
    """sinkhorn_momentum: decay rate of the momentum."""
    gamma: PositiveFloat = 0.18
    """sinkhorn_momentum: factor on the learning rate."""
    passes: PositiveInt = 11
    """sinkhorn_momentum: normalisation passes, alternating, by rows first and last."""
    threshold: NonNegativeFloat = 1e-3
    """sinkhorn_momentum: rows whose norm is at most this share of the mean row norm do not move."""

    def check(self) -> None:
        if self.weight_decay and not self.traits.counts_missed_steps:
            raise ValueError(
                f"weight_decay={self.weight_decay} with {self.name}: rows outside a step would miss their decay; "
                f"set it to 0 or use {_names(lambda traits: traits.counts_missed_steps)}"
            )
        if self.traits.balances and self.passes % 2 == 0:
            raise ValueError(f"passes={self.passes}: passes start and end with rows, so the number must be odd")

    @property
    def traits(self) -> RowOptimizerTraits:
        return ROW_OPTIMIZER_TRAITS[self.name]

    @property
    def is_dense(self) -> bool:
        """True when a step moves rows outside its working set."""
        return self.traits.balances and self.dense

    @property
    def counts_updates(self) -> bool:
        """True when the bias correction of a row's moments counts the updates of the row, not of the table."""
        return False


class TableConfig(Section):
    """Tables of a memory: where rows live, how far ahead they are fetched, how they are trained."""

    store: Literal["device", "host", "mmap"] = "host"
    """Where a rank keeps its rows and their optimizer state: device memory, host memory, or a mapped file."""
    folder: str | None = None
    """mmap: a folder local to the machine; needed on several machines. Default: one with the memory's name in the run
    folder."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Type of the rows; optimizer state is fp32."""
    prefetch_depth: Annotated[int, Field(ge=0, le=64)] = 1
    """Number of steps whose rows are fetched ahead of the running step. Results do not depend on it while staleness
    is 0."""
    staleness: NonNegativeInt = 0
    """Number of earlier steps whose updates a fetched row may lack; at most prefetch_depth. 0 is exact. Above 0 a
    resumed run is not bit-identical to an uninterrupted one."""
    threads: PositiveInt = 1
    """Host threads per rank that divide the rows of a gather or an update."""
    optimizer: RowOptimizerConfig = RowOptimizerConfig()
    """The optimizer of the rows."""

    def check(self) -> None:
        if self.staleness > self.prefetch_depth:
            raise ValueError(f"staleness={self.staleness} exceeds prefetch_depth={self.prefetch_depth}")
        if self.optimizer.is_dense and self.store == "mmap":
            raise ValueError(
                f"optimizer.name={self.optimizer.name} with optimizer.dense=true passes over every row several times "
                "per step, which a mapped file cannot serve; set optimizer.dense=false, or store=host"
            )
        if self.optimizer.stochastic_rounding and self.dtype != "bf16":
            raise ValueError("optimizer.stochastic_rounding=true needs dtype=bf16")


class BlockOptimizerConfig(RowOptimizerConfig):
    """The optimizer of a bank's blocks, lazy_adam or adam_catchup. Blocks outside a step's working set never move. With
    lazy_adam each block counts its own steps, like a parameter of its own; adam_catchup keeps the moments of dense Adam
    and, like it, counts all steps."""

    lr_multiplier: PositiveFloat = 1.0
    """Factor on the learning rate of the step."""

    def check(self) -> None:
        if not self.traits.by_value:
            raise ValueError(
                f"name={self.name} keeps numbers that all values of a row share, and a row holds a cluster's blocks "
                "for the layers of one pipeline stage: results would depend on parallel.pipeline; use "
                f"{_names(lambda traits: traits.by_value)}"
            )
        if self.stochastic_rounding:
            raise ValueError(
                "stochastic_rounding=true draws by a value's place in its row, and a row holds a cluster's blocks for "
                "the layers of one pipeline stage: results would depend on parallel.pipeline; set it to false"
            )

    @property
    def counts_updates(self) -> bool:
        """With lazy_adam, a block that text reaches late begins like a new parameter. Caught-up moments equal the
        moments of dense Adam, whose correction counts all steps."""
        return self.traits.counts_own_updates


class BankTableConfig(TableConfig):
    """Tables of the model's bank: where blocks live, how far ahead they are fetched, how they are trained."""

    folder: str | None = None
    """mmap: a folder local to the machine; needed on several machines. Default: `bank` in the run folder."""
    hold: Literal["all", "subtrees"] = "all"
    """all: the tables hold all blocks of the bank. subtrees: tables and checkpoints hold only the blocks that the text
    of data.addresses.subtrees uses: blocks of these clusters, and of the clusters below and above them. kmem bank merge
    joins the checkpoints of such jobs."""
    optimizer: BlockOptimizerConfig = BlockOptimizerConfig()
    """The optimizer of the blocks."""
