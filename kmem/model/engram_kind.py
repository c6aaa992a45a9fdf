"""The engram as a kind of memory: rows of hashed n-grams at the entrance of some layers."""

from .engram import Engram
from .engram_export import COMPRESSION, ExportedEngram
from .engram_reader import table_name, table_rows
from .memory_kind import TableShape
from .shape import Shape
from .token_rows import TokenRowsKind


class EngramKind(TokenRowsKind):
    """One table per layer; token ids address its rows."""

    name = "engram"
    title = "an n-gram memory (engram)"
    controls = ("on", "off", "shuffled", "single-row")
    """off: layers compute without the engram. shuffled: every n-gram reads another n-gram's row. single-row: every
    n-gram reads the first row of each head."""
    exported = ExportedEngram
    exported_fields = ("addressing",)

    def layers(self, shape: Shape) -> tuple[int, ...]:
        return () if shape.engram is None else tuple(sorted(shape.engram.layers))

    def module(self, shape: Shape, layer: int) -> Engram:
        engram = shape.engram
        return Engram(
            shape.hidden_size,
            self.row_values(shape, layer),
            shape.branches,
            # models saved before these had fields of their own lack them
            norm_eps=engram.get("gate_norm_eps") or shape.norm_eps,
            conv_norm_eps=engram.get("conv_norm_eps") or shape.norm_eps,
            conv_dilation=engram.conv_dilation or engram.orders[-1],
            bias=engram.bias,
            zero_centered_norm=engram.zero_centered_norm,
            conv_kernel=engram.conv_kernel,
            conv_within_documents=engram.conv_within_documents,
        )

    def tables(self, shape: Shape) -> dict[str, TableShape]:
        return {
            table_name(layer): TableShape(layer, rows, shape.engram.row_dim)
            for layer, rows in table_rows(shape).items()
        }

    def init_std(self, shape: Shape) -> float:
        return shape.engram.init_std

    def exported_tensors(self, shape: Shape) -> dict[str, int]:
        return {COMPRESSION: shape.vocab_size} if shape.engram.compression else {}

    def row_values(self, shape: Shape, layer: int) -> int:
        engram = shape.engram
        return len(engram.orders) * engram.heads * engram.row_dim
