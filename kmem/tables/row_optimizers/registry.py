"""The row optimizers by name, as configurations name them."""

from typing import Any

from kmem.config import RowOptimizerConfig
from kmem.tables.row_optimizers.adam import AdamCatchUp, LazyAdam
from kmem.tables.row_optimizers.row_optimizer import RowOptimizer
from kmem.tables.row_optimizers.rowwise_adagrad import RowwiseAdagrad
from kmem.tables.row_optimizers.sinkhorn_momentum import SinkhornMomentum

ROW_OPTIMIZERS: dict[str, type[RowOptimizer]] = {
    "lazy_adam": LazyAdam,
    "adam_catchup": AdamCatchUp,
    "rowwise_adagrad": RowwiseAdagrad,
    "sinkhorn_momentum": SinkhornMomentum,
}


def make_row_optimizer(settings: RowOptimizerConfig, *arguments: Any, **keywords: Any) -> RowOptimizer:
    """Make the optimizer that the settings name; further arguments go to `RowOptimizer`."""
    return ROW_OPTIMIZERS[settings.name](settings, *arguments, **keywords)
