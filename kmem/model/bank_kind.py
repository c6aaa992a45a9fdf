"""The bank as a kind of memory: blocks of weights in some layers, fetched for a context."""

from torch import Tensor

from .bank_blocks import BankInput
from .bank_export import ExportedBank
from .bank_layout import BankLayout, bank_table_name, layer_bank_name
from .memory_kind import ExportedRows, MemoryModule, ModelKind, TableShape
from .shape import Shape


class BankModule(MemoryModule):
    """The bank in one layer. It has no parameters: all blocks are in the tables."""

    def project(self, name: str, x: Tensor, out: Tensor, read: BankInput) -> Tensor:
        return read.adapt(name, x, out)

    def attend(self, query: Tensor, read: BankInput) -> Tensor | None:
        return read.attend(query)

    def feed(self, x: Tensor, out: Tensor | None, read: BankInput) -> Tensor | None:
        # Configurations refuse banks of feed-forwards where another memory replaces the feed-forward.
        return None if out is None else read.widen(x, out)


class BankKind(ModelKind):
    """One table per level and layer; its rows are the blocks of the clusters of that level."""

    name = "bank"
    title = "a memory bank"
    controls = ("fetched", "generic", "none", "blocked")
    """generic: the generic blocks instead of the clusters' blocks. none: no blocks. blocked: the blocks of the next
    nearest clusters, as if the bank had nothing below the context's own cluster of level 1."""
    exported = ExportedBank
    exported_fields = ("tree",)

    def trained_control(self, shape: Shape) -> str:
        return shape.bank_control

    def has_control(self, shape: Shape, control: str) -> bool:
        return control != "generic" or shape.bank.generic.probability > 0

    def telling_controls(self, shape: Shape) -> tuple[str, ...]:
        """If only generic blocks were trained, the clusters' blocks still have their initial values and tell
        nothing."""
        return ("none",) if self.trained_control(shape) == "generic" else super().telling_controls(shape)

    def layers(self, shape: Shape) -> tuple[int, ...]:
        return shape.bank_layers

    def module(self, shape: Shape, layer: int) -> BankModule:
        return BankModule()

    def tables(self, shape: Shape) -> dict[str, TableShape]:
        layout = BankLayout.of(shape)
        return {
            layer_bank_name(layer, level): TableShape(layer, layout.rows(level), layout.block_values(level))
            for layer in layout.layers
            for level in layout.levels
        }

    def exported_rows(self, shape: Shape) -> dict[int, ExportedRows]:
        """Level -> table. A row holds the blocks of all layers, so a context reads one piece of a file per level."""
        layout = BankLayout.of(shape)
        return {
            level: ExportedRows(
                bank_table_name(level),
                layout.rows(level),
                layout.row_values(level),
                tuple(layer_bank_name(layer, level) for layer in layout.layers),
            )
            for level in layout.levels
        }

    def components(self, shape: Shape) -> dict[str, int]:
        layout = BankLayout.of(shape)
        generic = {"generic": layout.fetched_values} if layout.generic else {}
        return {"bank": layout.bank_values, **generic}

    def fetched_values(self, shape: Shape) -> int:
        return BankLayout.of(shape).fetched_values

    def row_values(self, shape: Shape, layer: int) -> int:
        layout = BankLayout.of(shape)
        return sum(layout.block_values(level) for level in layout.levels)

    def multiplied_values(self, shape: Shape, layer: int) -> int:
        return self.row_values(shape, layer)
