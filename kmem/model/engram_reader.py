"""From token ids to the rows of every layer that has an engram, and what a generation keeps of them.

Training reads rows from sharded tables and an export from its own (`engram_export`); both use the same
`EngramAddresses`.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .engram import ConvolutionState
from .engram_compression import TokenCompression, compress_vocabulary
from .engram_hash import prime_sizes
from .engram_ngrams import MISSING, NgramAddressing
from .shape import Shape
from .token_rows import TokenState, shuffled_within

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

    def other_rows(self, layer: int, control: str) -> Callable[[Tensor], Tensor]:
        """A function from the row ids of a layer's table to row ids that belong to other n-grams, for a control.

        Args:
            control: single-row: the first row of each head. shuffled: rows at a fixed random distance within their
                head.
        """
        table = self.layers.index(layer)
        draw = random.Random(f"{SHUFFLE_SEED} {table}")
        sizes, first = torch.tensor(self.addressing.sizes[table]), torch.tensor(self.addressing.offsets(table))
        distance = torch.tensor([draw.randrange(1, size) for size in sizes.tolist()])
        if control == "single-row":
            return lambda rows: first.to(rows.device).expand_as(rows)
        return shuffled_within(sizes, first, distance)


class EngramState(TokenState):
    """The engram's state for a batch of sequences in generation: the last N-1 addressed ids, and the inputs of each
    layer's convolution, if it has one."""

    def __init__(self, context: Tensor, convolutions: dict[int, ConvolutionState]) -> None:
        super().__init__(context)
        self.convolutions = convolutions

    def record(self, on: bool) -> None:
        super().record(on)
        for state in self.convolutions.values():
            state.recording = on

    def crop(self, tokens: int) -> None:
        recording = self._recorded is not None
        super().crop(tokens)
        for state in self.convolutions.values() if recording else ():
            state.crop(tokens)

    def reorder(self, order: Tensor) -> None:
        super().reorder(order)
        order = order.to(self.context.device)
        for state in self.convolutions.values():
            state.reorder(order)


def _bases(engram: Any) -> list[int]:
    bases = engram.rows_per_head
    return [bases] * len(engram.orders) if isinstance(bases, int) else list(bases)
