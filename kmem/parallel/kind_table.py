"""The table of a stage as its kind's model half describes it."""

from kmem.checkpoint.pieces import Pieces
from kmem.config import Config
from kmem.parallel.memory_kind import MemoryKind, StageTable
from kmem.parallel.stage_tables import mapped_folder
from kmem.tables.exchange import Exchange
from kmem.tables.table import Table
from kmem.tables.table_spec import TableSpec


class KindTable(StageTable):
    """One of `ModelKind.tables`, whole, under its canonical name."""

    def __init__(
        self, kind: MemoryKind, config: Config, name: str, in_forward: Exchange | None = None, is_copy: bool = False
    ) -> None:
        self.section = kind.name
        self.settings = kind.settings(config)
        self.optimizer = kind.optimizer(config)
        self.in_forward, self.is_copy = in_forward, is_copy
        self._kind, self._name = kind.model, name

    def spec(self, config: Config) -> TableSpec:
        settings, shape = self.settings, config.model.shape
        table = self._kind.tables(shape)[self._name]
        return TableSpec(
            self._name,
            table.rows,
            table.width,
            settings.dtype,
            settings.store,
            mapped_folder(config, settings, self.section) if settings.store == "mmap" else None,
            config.train.init_seed,
            self._kind.init_std(shape),
        )

    def pieces(self, table: Table) -> dict[str, dict[str, Pieces]]:
        return {self._name: table.pieces()}
