"""Memory that a table costs a rank: rows, optimizer state, and the rows in use."""

from dataclasses import dataclass
from typing import Literal

import torch

from kmem.config import RowOptimizerConfig, TableConfig
from kmem.parallel.mesh import Mesh
from kmem.tables.row_optimizers import make_row_optimizer
from kmem.tables.sharding import row_range
from kmem.tables.stores import ArrayLayout, RecordLayout, StoreKind
from kmem.tables.table_spec import DTYPES


@dataclass(frozen=True)
class TableBytes:
    """The cost of a stage's table, on the rank that owns most of its rows."""

    kind: str
    """Kind of memory."""
    place: Literal["layer", "level"]
    number: int
    """Number of the layer or level."""
    rows: int
    """Rows of this rank."""
    row_bytes: int
    state_bytes: int
    """Optimizer state of a row."""
    busy_bytes: int
    """Count of the steps that hold a row, and padding of its record in a mapped file. With a device store, the count is
    in host memory."""
    store: StoreKind
    working_set: int
    """Upper bound for the running step, on the compute device: unique rows and their gradient in fp32, and an index of
    all look-ups. The bound takes as many unique rows as look-ups; text repeats itself, so a step has fewer. A bank
    looks up once per sequence if sequences have single leaves, else once per token."""
    host_buffers: int
    """Upper bound, in host memory: rows and indices of the steps that are fetched ahead; for a table that layers look
    up in the forward pass, the sums of gradients that wait for the end of the step."""

    @property
    def bytes(self) -> int:
        """Rows with state and counts. Every array starts at a page, which adds up to one page per array."""
        return self.rows * (self.row_bytes + self.state_bytes + self.busy_bytes)

    @classmethod
    def of(
        cls,
        kind: str,
        place: Literal["layer", "level"],
        number: int,
        settings: TableConfig,
        optimizer: RowOptimizerConfig | None,
        mesh: Mesh,
        rows: int,
        dim: int,
        look_ups: int,
        indexed: int,
    ) -> "TableBytes":
        """The cost of a table of `rows` rows of `dim` values.

        Args:
            look_ups: upper bound of the rows that a rank looks up in a step.
            indexed: entries of the step's index.
        """
        state = {} if optimizer is None else make_row_optimizer(optimizer, dim, 0, "").state()
        state_bytes = sum(array.row_bytes for array in state.values())
        row, busy = ArrayLayout(dim, DTYPES[settings.dtype]), ArrayLayout(1, torch.uint8)
        row_bytes, busy_bytes, unique = row.row_bytes, busy.row_bytes, min(look_ups, rows)
        if settings.store == "mmap":
            busy_bytes = RecordLayout.of({"rows": row, **state, "busy": busy}).stride - row_bytes - state_bytes
        index = indexed * torch.int64.itemsize
        return cls(
            kind=kind,
            place=place,
            number=number,
            rows=len(row_range(rows, mesh.data, 0)),
            row_bytes=row_bytes,
            state_bytes=state_bytes,
            busy_bytes=busy_bytes,
            store=settings.store,
            working_set=2 * unique * dim * torch.float32.itemsize + index,
            host_buffers=settings.prefetch_depth * (unique * row_bytes + index),
        )
