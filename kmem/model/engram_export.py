"""The engram of a whole model: its addressing in config.json, its rows, and its state in generation. Ships beside
exported weights."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .engram import Engram, EngramInput
from .engram_compression import TokenCompression
from .engram_ngrams import NgramAddressing
from .engram_reader import EngramAddresses, EngramState, table_rows
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
        self._addresses: EngramAddresses | None = None

    def attach(self, modules: Mapping[int, MemoryModule]) -> None:
        self._modules = {layer: module for layer, module in modules.items() if isinstance(module, Engram)}

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        self.addresses(tensors)

    def addresses(self, tensors: Mapping[str, Tensor]) -> EngramAddresses:
        """The addresses for the tensor of the compression, if the model has one.

        Raises:
            ValueError: the tensor is not the map that the tables were trained with.
        """
        lookup = tensors.get(COMPRESSION)
        if self._addresses is not None:
            known = self._addresses.compression
            if known is None or known.lookup is lookup:  # the tensor differs after a move to another device
                return self._addresses
        compression = None
        if lookup is not None:
            size = self.addressing.compressed_vocab_size
            assert size is not None
            compression = TokenCompression(lookup, size)
        self._addresses = EngramAddresses(self.addressing, compression)
        return self._addresses

    def read(self, tokens: ForwardTokens, carried: Carried | None) -> dict[int, Any]:
        assert tokens.input_ids is not None
        addresses, documents = self.addresses(tokens.tensors), tokens.document_ids
        present = None if tokens.present is None or bool(tokens.present.all()) else tokens.present.bool()
        ids = addresses.addressed(tokens.input_ids, present)
        state = self.state(tokens, carried, lambda: self._start(len(ids), ids.device))
        context = None if state is None else state.context
        inputs = {}
        for table, layer in enumerate(self.addressing.layers):
            rows = self.addressing.row_ids(table, ids, documents, context)
            if self.control != "on":
                rows = torch.where(rows >= 0, addresses.other_rows(layer, self.control)(rows), rows)
            # A missing token reads row 0, and its update is masked.
            values = self.sources[layer](rows if present is None else rows.clamp_min(0))
            convolution = None if state is None else state.convolutions.get(layer)
            inputs[layer] = EngramInput(values.flatten(-2), present, documents, convolution)
        if state is not None:
            state.advance(ids, self.addressing.next_context(ids, documents, context))
        return inputs

    def _start(self, batch: int, device: torch.device) -> EngramState:
        """The state before the first tokens of `batch` sequences."""
        states = {layer: module.start(batch) for layer, module in self._modules.items()}
        convolutions = {layer: state for layer, state in states.items() if state is not None}
        return EngramState(self.addressing.start(batch, device), convolutions)
