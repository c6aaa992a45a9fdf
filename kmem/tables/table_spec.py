"""The description of a table, and the metrics of a step."""

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
    """The description of a table.

    Args:
        name: canonical name; it seeds the initial rows and names the table's arrays in checkpoints.
        rows: number of rows over all ranks.
        dim: number of values per row.
        dtype: dtype of the rows; the optimizer state is fp32.
        store: kind of storage on each rank.
        folder: folder of the rank's file with the store "mmap"; it must exist, on a local disk.
        seed: seed of the run.
        init_std: standard deviation of the initial values.
        initial_rows: function from (start, stop) to the initial values of rows [start, stop), fp32 [stop - start,
            dim]; replaces the drawn values.
        selection: the rows of a larger table that this table holds; default: the table is whole. Only checkpoints use
            the row numbers of the larger table; everything else counts rows from 0.

    Raises:
        UserError: the table is too large for 64-bit numbers, or the store "mmap" has no folder.
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
    """Number of bytes per row in host memory, including its optimizer state, if any, and its busy count."""
    state = {} if optimizer is None else make_row_optimizer(optimizer, spec.dim, spec.seed, spec.name).state()
    return spec.dim * DTYPES[spec.dtype].itemsize + sum(layout.row_bytes for layout in state.values()) + 1


@dataclass
class StepMetrics:
    """The metrics of one step of a table, on this rank."""

    addresses: int = 0
    """Number of row ids that all micro-batches looked up."""
    unique_rows: int = 0
    """Number of distinct row ids among them."""
    conflict_rows: int = 0
    """Number of unique rows that had to wait for an earlier step's commit."""
    owned_rows: int = 0
    """Number of this rank's rows that any rank asked for."""
    bytes: int = 0
    """Number of bytes sent to other ranks."""
    stall_ms: float = 0.0
    """Time that the main thread waited for rows."""
    fetch_ms: float = 0.0
    """Time that the worker spent to get the rows for the ids."""
    owner_ms: float = 0.0
    """Time of the row optimizer; for rows in device memory, the time to queue it."""

    @property
    def dedup_ratio(self) -> float:
        """Number of addresses per unique row."""
        return self.addresses / max(1, self.unique_rows)
