"""What a table is, and what one of its steps did."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from kmem.config import RowOptimizerConfig, UserError
from kmem.tables.row_optimizers import make_row_optimizer
from kmem.tables.sharding import RowSelection
from kmem.tables.stores import StoreKind

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class TableSpec:
    """What a table is.

    Args:
        name: canonical name; seeds the initial rows and names the state in checkpoints.
        rows: over all ranks.
        dim: values per row.
        dtype: of the rows; their optimizer state is fp32.
        store: where a rank keeps its rows.
        folder: where "mmap" puts the rank's file; local to the machine, must exist.
        seed: of the run.
        init_std: standard deviation of the initial values.
        initial_rows: gives rows [start, stop) of this table their first values, fp32 [stop - start, dim], instead.
        selection: which rows of a larger table these are; default: it is whole. Everything but checkpoints counts
            them from 0.
    """

    name: str
    rows: int
    dim: int
    dtype: Literal["fp32", "bf16"] = "fp32"
    store: StoreKind = "host"
    folder: Path | None = None
    seed: int = 0
    init_std: float = 0.02
    initial_rows: Callable[[int, int], Tensor] | None = None
    selection: RowSelection | None = None

    def __post_init__(self) -> None:
        assert self.selection is None or len(self.selection) == self.rows
        if self.rows * self.dim >= 1 << 61:
            raise UserError(f"table {self.name}: {self.rows} rows of {self.dim} values cannot be numbered in 64 bits")
        if self.store == "mmap" and self.folder is None:
            raise UserError(f"table {self.name}: the mmap store needs a folder")


def row_bytes(spec: TableSpec, optimizer: RowOptimizerConfig | None) -> int:
    """Bytes of one row in host memory, the state of its optimizer, if it has one, and its busy count included."""
    state = {} if optimizer is None else make_row_optimizer(optimizer, spec.dim, spec.seed, spec.name).state()
    return spec.dim * DTYPES[spec.dtype].itemsize + sum(layout.row_bytes for layout in state.values()) + 1


@dataclass
class StepMetrics:
    """What one step of a table did on this rank."""

    addresses: int = 0
    """Row ids looked up by all micro-batches."""
    unique_rows: int = 0
    """Distinct ones among them."""
    conflict_rows: int = 0
    """Unique rows that had to wait for an earlier step's commit."""
    owned_rows: int = 0
    """Rows of this rank that any rank asked for."""
    bytes: int = 0
    """Sent to other ranks."""
    stall_ms: float = 0.0
    """Time that the main thread waited for rows."""
    fetch_ms: float = 0.0
    """Time of the worker on the way from ids to rows."""
    owner_ms: float = 0.0
    """Time of the row optimizer; where rows are in device memory, of queueing it."""

    @property
    def dedup_ratio(self) -> float:
        """Addresses per unique row."""
        return self.addresses / max(1, self.unique_rows)
