"""Optimizers of table rows: only the rows of a step's working set, and their state, are read and written."""

from kmem.tables.row_optimizers.optimizer import RowOptimizer
from kmem.tables.row_optimizers.update import RowUpdate

__all__ = ["RowOptimizer", "RowUpdate"]
