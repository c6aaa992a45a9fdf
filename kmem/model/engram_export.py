"""The engram of a whole model: its addressing in config.json, its rows, and its state in generation. Ships beside
exported weights."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .engram import Engram
from .engram_compression import TokenCompression
from .engram_ngrams import NgramAddressing
from .engram_reader import EngramAddresses, EngramReader, table_rows
from .exported_memory import Carried, ExportedMemory, ForwardTokens
from .memory_kind import MemoryModule, ModelKind
from .shape import Shape

COMPRESSION = "token_compression"
"""Name of the tensor that maps token ids to compressed ids, int64 [V] (V token ids)."""


class ExportedEngram(ExportedMemory):
    """Field of config.json: `engram_addressing`, which n-gram reads which row (`NgramAddressing.to_manifest`)."""

    needs_token_ids = True
    keeps_state = True

    def __init__(self, kind: ModelKind, shape: Shape, fields: Mapping[str, Any]) -> None:
        super().__init__(kind, shape, fields)
        manifest = fields.get("addressing")
        if manifest is None:
            raise ValueError(
                "config.json: engram_addressing is missing; without it the rows of model.engram mean nothing"
            )
        try:
            self.addressing = NgramAddressing.from_manifest(manifest)
        except ValueError as error:
            raise ValueError(f"config.json: engram_addressing: {error}") from error
        expected = table_rows(shape)
        rows_by_layer = {
            layer: self.addressing.padded_rows(table) for table, layer in enumerate(self.addressing.layers)
        }
        vocabulary = self.addressing.raw_vocab_size
        if rows_by_layer != expected or vocabulary != shape.vocab_size:
            raise ValueError(
                f"config.json: engram_addressing has tables of {rows_by_layer} rows for {vocabulary} token ids, but "
                f"`model` has tables of {expected} rows for {shape.vocab_size}"
            )
        self._modules: dict[int, Engram] = {}
        self._reader: EngramReader | None = None

    def attach(self, modules: Mapping[int, MemoryModule]) -> None:
        self._modules = {layer: module for layer, module in modules.items() if isinstance(module, Engram)}

    def use(self, sources: Mapping[int, Any]) -> None:
        super().use(sources)
        self._reader = None

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        self.reader(tensors)

    def reader(self, tensors: Mapping[str, Tensor]) -> EngramReader:
        """The reader for the tensor of the compression, if the model has one.

        Raises:
            ValueError: the tensor is not the map that the tables were trained with.
        """
        lookup = tensors.get(COMPRESSION)
        if self._reader is not None:
            known = self._reader.addresses.compression
            if known is None or known.lookup is lookup:  # the tensor differs after a move to another device
                return self._reader
        compression = None
        if lookup is not None:
            size = self.addressing.compressed_vocab_size
            assert size is not None
            compression = TokenCompression(lookup, size)
        self._reader = EngramReader(EngramAddresses(self.addressing, compression), self.sources, self._modules)
        return self._reader

    def read(self, tokens: ForwardTokens, carried: Carried | None) -> dict[int, Any]:
        reader, ids = self.reader(tokens.tensors), tokens.input_ids
        assert ids is not None
        reader.control = self.control
        state = self.state(tokens, carried, lambda: reader.start(len(ids), ids.device))
        present = None if tokens.present is None or bool(tokens.present.all()) else tokens.present.bool()
        return dict(reader.read(ids, tokens.document_ids, present, state))
