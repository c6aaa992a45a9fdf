"""The engram of a whole model in one process: from token ids to the rows of every layer that has an engram.

Training reads rows from sharded tables instead (`kmem.tables`); both use the same `EngramAddresses`.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .engram import ConvolutionState, Engram, EngramInput
from .engram_compression import TokenCompression, compress_vocabulary
from .engram_hash import prime_sizes
from .engram_ngrams import MISSING, NgramAddressing
from .export_tables import RowSource
from .shape import Shape

# Shape letters: B sequences, T tokens, K rows per token and layer, R rows of a table, N largest n-gram order.

SHUFFLE_SEED = 0


def table_name(layer: int) -> str:
    """Canonical name of a layer's table, [R, D]."""
    return f"layers.{layer}.engram.table"


def table_rows(shape: Shape) -> dict[int, int]:
    """Layer -> number of rows of its table, padding included; it does not depend on the tokenizer."""
    engram = shape.engram
    if engram is None:
        return {}
    sizes = prime_sizes(len(engram.layers), _bases(engram), engram.heads)
    multiple = engram.row_multiple
    return {layer: -(-sum(row) // multiple) * multiple for layer, row in zip(engram.layers, sizes, strict=True)}


@dataclass(frozen=True)
class EngramAddresses:
    """From token ids to row ids: the compression of the vocabulary, if the model has one, and the hashes.

    Raises:
        ValueError: the addressing was made for another compression.
    """

    addressing: NgramAddressing
    compression: TokenCompression | None = None

    def __post_init__(self) -> None:
        stated = self.addressing.compression_digest
        digest = None if self.compression is None else self.compression.digest
        if stated != digest:
            raise ValueError(
                f"compression_digest: the addressing was made for {stated}, but this vocabulary gives {digest}"
            )

    @classmethod
    def build(
        cls, shape: Shape, eos_token_id: int, tokenizer: Any = None, tokenizer_fingerprint: str | None = None
    ) -> "EngramAddresses":
        """The addresses of a model.

        Args:
            eos_token_id: the tokenizer's end-of-text id.
            tokenizer: from Transformers or tokenizers; needed if the model compresses its vocabulary.
            tokenizer_fingerprint: identity of the tokenizer, recorded in the manifest.
        """
        engram = shape.engram
        compression = None
        if engram.compression:
            assert tokenizer is not None, "compressing a vocabulary needs its tokenizer"
            compression = compress_vocabulary(tokenizer, shape.vocab_size)
        pad = eos_token_id if engram.pad_token_id is None else engram.pad_token_id
        addressing = NgramAddressing.build(
            variant=engram.preset,
            layers=engram.layers,
            raw_vocab_size=shape.vocab_size,
            compressed_vocab_size=None if compression is None else compression.vocab_size,
            orders=engram.orders,
            heads=engram.heads,
            rows_per_head=_bases(engram),
            boundary=engram.boundary,
            pad_id=pad if compression is None else int(compression.lookup[pad]),
            hash=engram.hash,
            seed=engram.seed,
            seeding_ids=engram.seeding_ids,
            row_multiple=engram.row_multiple,
            compression_digest=None if compression is None else compression.digest,
            tokenizer_fingerprint=tokenizer_fingerprint,
        )
        return cls(addressing, compression)

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers that have a table, in the order of the tables."""
        return self.addressing.layers

    def addressed(self, input_ids: Tensor, present: Tensor | None = None) -> Tensor:
        """Ids of the addressed vocabulary for token ids int64 [B, T]; MISSING where bool `present` [B, T] is False."""
        ids = input_ids if present is None else input_ids.masked_fill(~present, MISSING)
        return ids if self.compression is None else self.compression(ids)

    def row_ids(self, layer: int, input_ids: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """Row ids int64 [B, T, K] of a layer's table for whole sequences of token ids int64 [B, T] without missing
        tokens."""
        return self.addressing.row_ids(self.layers.index(layer), self.addressed(input_ids), document_ids)


def other_rows(addressing: NgramAddressing, table: int, control: str) -> Callable[[Tensor], Tensor]:
    """A function from the row ids of a table to row ids that belong to other n-grams, for a control.

    Args:
        control: single-row: the first row of each head. shuffled: rows at a fixed random distance within their head, so
            each row is read by exactly one other address.
    """
    draw = random.Random(f"{SHUFFLE_SEED} {table}")
    distances = [draw.randrange(1, size) for size in addressing.sizes[table]]

    def other(rows: Tensor) -> Tensor:
        numbers = (addressing.sizes[table], addressing.offsets(table), distances)
        sizes, first, distance = (torch.tensor(values, device=rows.device) for values in numbers)
        return first.expand_as(rows) if control == "single-row" else (rows - first + distance) % sizes + first

    return other


class EngramState:
    """The engram's state for a batch of sequences in generation: the last N-1 addressed ids, and the inputs of each
    layer's convolution, if it has one."""

    def __init__(self, context: Tensor, convolutions: dict[int, ConvolutionState]) -> None:
        self.context = context
        """int64 [B, N-1], MISSING before a sequence's first token."""
        self.convolutions = convolutions
        self._recorded: Tensor | None = None  # int64 [B, N-1 + tokens since recording began or the last crop]

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return len(self.context)

    def record(self, on: bool) -> None:
        """Set whether to record what `crop` needs to remove later tokens."""
        if on != (self._recorded is not None):
            self._recorded = self.context if on else None
        for state in self.convolutions.values():
            state.recording = on

    def advance(self, ids: Tensor, context: Tensor) -> None:
        """Note that the addressed ids int64 [B, T] were read; `context` [B, N-1] is the look-back of the next ones."""
        self.context = context
        if self._recorded is not None:
            self._recorded = torch.cat((self._recorded, ids), dim=1)

    def crop(self, tokens: int) -> None:
        """Remove the last `tokens` tokens, and restart recording.

        Raises:
            ValueError: fewer tokens were recorded, or the number is negative.
        """
        if tokens < 0:
            raise ValueError(
                f"crop({-tokens}): give the number of tokens to remove as a negative number; assisted decoding with an "
                "engram needs a Transformers whose caches have activate_past_recording()"
            )
        length = self.context.shape[1]
        recorded = 0 if self._recorded is None else self._recorded.shape[1] - length
        if tokens > recorded:
            raise ValueError(
                f"cannot remove {tokens} tokens: the engram has recorded {recorded}; call activate_past_recording() of "
                "the cache before the tokens are read"
            )
        if self._recorded is None:
            return
        self._recorded = self._recorded[:, recorded - tokens : recorded - tokens + length]
        self.context = self._recorded
        for state in self.convolutions.values():
            state.crop(tokens)

    def reorder(self, order: Tensor) -> None:
        """Select the sequences `order` int64 [B'] for beam search; a sequence may occur several times."""
        order = order.to(self.context.device)
        self.context = self.context.index_select(0, order)
        if self._recorded is not None:
            self._recorded = self._recorded.index_select(0, order)
        for state in self.convolutions.values():
            state.reorder(order)


class EngramReader:
    """Reads the engram rows of a whole model.

    Args:
        addresses: the model's addresses.
        sources: layer -> function that reads its rows.
        modules: layer -> its Engram module, which makes the state of its convolution.
    """

    def __init__(
        self, addresses: EngramAddresses, sources: Mapping[int, RowSource], modules: Mapping[int, Engram]
    ) -> None:
        self.addresses = addresses
        self.control = "on"
        """One of `EngramKind.controls` but "off". Can be set."""
        self.sources = dict(sources)
        self._modules = dict(modules)

    def start(self, batch: int, device: torch.device | str | None = None) -> EngramState:
        """The state before the first tokens of `batch` sequences."""
        states = {layer: module.start(batch) for layer, module in self._modules.items()}
        convolutions = {layer: state for layer, state in states.items() if state is not None}
        return EngramState(self.addresses.addressing.start(batch, device), convolutions)

    def read(
        self,
        input_ids: Tensor,
        document_ids: Tensor | None = None,
        present: Tensor | None = None,
        state: EngramState | None = None,
    ) -> dict[int, EngramInput]:
        """Layer -> its input for token ids int64 [B, T].

        Args:
            document_ids: int64 [B, T]; default: each sequence is one document.
            present: bool [B, T], False where a token is padding.
            state: the state after the preceding tokens; advanced in place.
        """
        addressing = self.addresses.addressing
        ids = self.addresses.addressed(input_ids, present)
        context = None if state is None else state.context
        inputs: dict[int, EngramInput] = {}
        for table, layer in enumerate(addressing.layers):
            rows = addressing.row_ids(table, ids, document_ids, context)
            if self.control != "on":
                rows = torch.where(rows >= 0, other_rows(addressing, table, self.control)(rows), rows)
            # A missing token reads row 0, and its update is masked.
            values = self.sources[layer](rows if present is None else rows.clamp_min(0))
            convolution = None if state is None else state.convolutions.get(layer)
            inputs[layer] = EngramInput(values.flatten(-2), present, document_ids, convolution)
        if state is not None:
            state.advance(ids, addressing.next_context(ids, document_ids, context))
        return inputs


def _bases(engram: Any) -> list[int]:
    bases = engram.rows_per_head
    return [bases] * len(engram.orders) if isinstance(bases, int) else list(bases)
