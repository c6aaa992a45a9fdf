"""The engram of a Hugging Face folder: the description of its tables in config.json, and the tensors of their rows."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from .engram_ngrams import NgramAddressing
from .engram_reader import table_name, table_part_name, table_rows
from .export_tables import ExportedTable, read_parts
from .shape import Shape

COMPRESSION = "token_compression"
"""Name of the tensor that maps token ids to compressed ids, int64 [V] (V token ids)."""
TABLES = r"^layers\.\d+\.engram\.table\."
"""Regular expression for the start of the names of the tensors that hold rows."""


@dataclass(frozen=True)
class EngramDescription:
    """The engram's addressing and tables, as config.json describes them."""

    addressing: NgramAddressing
    parts: Mapping[int, list[int]]
    """Layer -> rows of each tensor of its table, in the order of the rows."""
    row_dim: int

    @classmethod
    def read(
        cls, shape: Shape, manifest: Mapping[str, Any] | None, parts: Mapping[str, list[int]]
    ) -> "EngramDescription":
        """The description of a model with an engram, from the contents of config.json.

        Raises:
            ValueError: names the field of config.json that is missing or contradicts `model`.
        """
        if manifest is None:
            raise ValueError(
                "config.json: engram_addressing is missing; without it the rows of model.engram mean nothing"
            )
        try:
            addressing = NgramAddressing.from_manifest(manifest)
        except ValueError as error:
            raise ValueError(f"config.json: engram_addressing: {error}") from error
        expected = table_rows(shape)
        rows_by_layer = {layer: addressing.padded_rows(table) for table, layer in enumerate(addressing.layers)}
        vocabulary = addressing.raw_vocab_size
        if rows_by_layer != expected or vocabulary != shape.vocab_size:
            raise ValueError(
                f"config.json: engram_addressing has tables of {rows_by_layer} rows for {vocabulary} token ids, but "
                f"`model` has tables of {expected} rows for {shape.vocab_size}"
            )
        cut = {
            layer: read_parts(parts.get(str(layer)), rows, "engram_parts", f"layer {layer}")
            for layer, rows in expected.items()
        }
        return cls(addressing, cut, shape.engram.row_dim)

    @property
    def compressed(self) -> bool:
        """Whether tokens are addressed by compressed ids."""
        return self.addressing.compressed_vocab_size is not None

    def tables(self) -> dict[int, ExportedTable]:
        """Layer -> its table in the folder."""
        return {
            layer: ExportedTable.cut(table_name(layer), self.row_dim, parts, partial(table_part_name, layer))
            for layer, parts in self.parts.items()
        }
