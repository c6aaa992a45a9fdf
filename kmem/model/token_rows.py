"""Memories whose rows are read by token ids: what their kinds share. Ships beside exported weights."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .exported_memory import Carried, ExportedMemory, ForwardTokens
from .memory_kind import ModelKind
from .shape import Shape

# Shape letters: B sequences, T tokens, K rows of a token in a layer, D values of a row, N tokens that an address
# depends on.

MISSING = -1
"""Stands for an id before a sequence's first token, for a padded token, and for its rows."""


class TokenRows(NamedTuple):
    """What a layer reads."""

    rows: Tensor
    """[B, T, K, D]."""
    present: Tensor | None = None
    """bool [B, T], False where a token is missing, whose rows mean nothing; None: no token is missing."""
    document_ids: Tensor | None = None
    """int64 [B, T]; None: each sequence is one document."""


class TokenAddresses(Protocol):
    """From token ids to the rows of a model's tables."""

    def row_ids(self, layer: int, input_ids: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """Row ids int64 [B, T, K] of a layer's table for whole sequences of token ids int64 [B, T]; MISSING for an id
        that is MISSING."""

    def other_rows(self, layer: int, control: str) -> Callable[[Tensor], Tensor]:
        """A function from the row ids of a layer's table to those of other tokens, for a control."""


class TokenRowsKind(ModelKind):
    """A kind with one table per layer, whose rows follow from token ids alone."""

    controls: tuple[str, ...] = ("on", "off", "shuffled")
    """off: layers compute without the memory. shuffled: every token reads the rows of another one."""

    def addresses(self, shape: Shape) -> TokenAddresses:
        """The addresses of a model."""
        raise NotImplementedError

    def look_back(self, shape: Shape) -> int:
        """Number of preceding tokens that the rows of a token depend on."""
        return 0


class ExportedTokenRows(ExportedMemory):
    """Token ids address the rows, without anything beside the model's section."""

    needs_token_ids = True

    def __init__(self, kind: TokenRowsKind, shape: Shape, fields: Mapping[str, Any]) -> None:
        super().__init__(kind, shape, fields)
        self.addresses, self.look_back = kind.addresses(shape), kind.look_back(shape)
        self.keeps_state = self.look_back > 0

    def read(self, tokens: ForwardTokens, carried: Carried | None) -> dict[int, TokenRows]:
        ids, documents = tokens.input_ids, tokens.document_ids
        assert ids is not None
        present = None if tokens.present is None or bool(tokens.present.all()) else tokens.present.bool()
        ids = ids if present is None else ids.masked_fill(~present, MISSING)
        assert carried is None or documents is None, "sequences that continue a cache are one document"
        state = None
        if self.keeps_state:
            start = ids.new_full((len(ids), self.look_back), MISSING)
            state = self.state(tokens, carried, lambda: TokenState(start))
        known = ids if state is None else torch.cat((state.context, ids), dim=1)
        inputs = {}
        for layer in self.sources:
            rows = self.addresses.row_ids(layer, known, documents)[:, known.shape[1] - ids.shape[1] :]
            if self.control == "shuffled":
                rows = torch.where(rows >= 0, self.addresses.other_rows(layer, self.control)(rows), rows)
            inputs[layer] = TokenRows(self.sources[layer](rows.clamp_min(0)), present, documents)
        if state is not None:
            state.advance(ids, known[:, known.shape[1] - self.look_back :])
        return inputs


class TokenState:
    """The last ids of a batch of sequences in generation.

    Args:
        context: int64 [B, N-1], MISSING before a sequence's first token.
    """

    def __init__(self, context: Tensor) -> None:
        self.context = context
        self._recorded: Tensor | None = None  # int64 [B, N-1 + tokens since recording began or the last crop]

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return len(self.context)

    def record(self, on: bool) -> None:
        """Set whether to record what `crop` needs to remove later tokens."""
        if on != (self._recorded is not None):
            self._recorded = self.context if on else None

    def advance(self, ids: Tensor, context: Tensor) -> None:
        """Note that the ids int64 [B, T] were read; `context` [B, N-1] is the look-back of the next ones."""
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
                f"crop({-tokens}): give the number of tokens to remove as a negative number; assisted decoding with "
                "n-grams needs a Transformers whose caches have activate_past_recording()"
            )
        length = self.context.shape[1]
        recorded = 0 if self._recorded is None else self._recorded.shape[1] - length
        if tokens > recorded:
            raise ValueError(
                f"cannot remove {tokens} tokens: the memory has recorded {recorded}; call activate_past_recording() of "
                "the cache before the tokens are read"
            )
        if self._recorded is not None:
            self.context = self._recorded = self._recorded[:, recorded - tokens : recorded - tokens + length]

    def reorder(self, order: Tensor) -> None:
        """Select the sequences `order` int64 [B'] for beam search; a sequence may occur several times."""
        order = order.to(self.context.device)
        self.context = self.context.index_select(0, order)
        if self._recorded is not None:
            self._recorded = self._recorded.index_select(0, order)


def shuffled_within(sizes: Tensor, first: Tensor, distances: Tensor) -> Callable[[Tensor], Tensor]:
    """A function that moves row ids [.., K] at a fixed distance within their part of a table, so that each row is read
    by exactly one other address.

    Args:
        sizes, first, distances: int64 [K], rows and first row of the part of each of a token's rows, and how far to
            move, below its size.
    """

    def other(rows: Tensor) -> Tensor:
        start, size, distance = (values.to(rows.device) for values in (first, sizes, distances))
        return (rows - start + distance) % size + start

    return other
