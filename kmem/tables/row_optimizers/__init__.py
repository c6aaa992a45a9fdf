"""Optimizers of table rows. They read and write only the rows of a step's working set, and their state."""

from kmem.tables.row_optimizers.registry import ROW_OPTIMIZERS, make_row_optimizer
from kmem.tables.row_optimizers.row_optimizer import RowOptimizer
from kmem.tables.row_optimizers.update import RowUpdate

__all__ = ["ROW_OPTIMIZERS", "RowOptimizer", "RowUpdate", "make_row_optimizer"]
