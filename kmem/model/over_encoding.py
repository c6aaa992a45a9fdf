"""Over-encoding: hashed n-grams of the tokens, added to the input embedding (arXiv 2501.16975; LongCat's n-gram
embeddings, arXiv 2601.21204)."""

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .matmul import Linear
from .memory_kind import OFF, MemoryModule, TableShape
from .norm import RMSNorm
from .shape import Shape
from .token_rows import MISSING, ExportedTokenRows, TokenAddresses, TokenRowsKind, shuffled_within

# Shape letters: B sequences, T tokens, K hash tables, H hidden size, V vocabulary.

NAME = "over_encoding"
LAYER = 0


class OverEncoding(MemoryModule):
    """At the entrance of layer 0: (e + sum over tables t of W_t E_t[id_t]) / (K + 1), then the amplification; e is the
    input embedding. The W_t stand side by side in one matrix [H, H]."""

    knows_off = True  # the factors stay, so that "off" tells what the rows do and not what the scale does

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        tables = _tables(shape)
        self.factor = (tables + 1) ** (-0.5 if shape.over_encoding.normalization == "root" else -1.0)
        if shape.over_encoding.amplification == "root":
            self.factor *= shape.hidden_size**0.5
        self.proj = Linear(shape.hidden_size, shape.hidden_size, bias=False)
        amplified = shape.over_encoding.amplification == "norm"
        self.norm = RMSNorm(shape.hidden_size, shape.norm_eps) if amplified else None

    def enter(self, hidden: Tensor, read: Any) -> Tensor:
        if read is not OFF:
            added = self.proj(read.rows.flatten(-2).to(self.proj.weight.dtype))
            hidden = hidden + (added if hidden.dim() == 3 else added.unsqueeze(2))  # the same in every branch
        hidden = hidden * self.factor
        return hidden if self.norm is None else self.norm(hidden)


class NgramSums:
    """Row ids: for a table of M rows and order n, (sum over j < n of x_{i-j} V^j) mod M, plus the rows of the tables
    before it. Absent tokens and those of another document count as 0."""

    def __init__(self, shape: Shape) -> None:
        section, vocabulary = shape.over_encoding, shape.vocab_size
        self.sizes = table_sizes(shape)
        self.first = [sum(self.sizes[:table]) for table in range(len(self.sizes))]
        self.orders = [2 + table // section.tables_per_order for table in range(len(self.sizes))]
        self.powers = [[pow(vocabulary, j, size) for j in range(section.max_order)] for size in self.sizes]

    def row_ids(self, layer: int, input_ids: Tensor, document_ids: Tensor | None = None) -> Tensor:
        tokens = [input_ids.clamp_min(0)]
        for back in range(1, max(self.orders)):
            earlier = F.pad(tokens[0], (back, 0))[:, : input_ids.shape[1]]
            if document_ids is not None:
                same = F.pad(document_ids, (back, 0), value=-1)[:, : input_ids.shape[1]] == document_ids
                earlier = earlier * same
            tokens.append(earlier)
        rows = []
        for size, first, order, powers in zip(self.sizes, self.first, self.orders, self.powers, strict=True):
            terms = [token * power % size for token, power in zip(tokens[:order], powers, strict=False)]
            rows.append(sum(terms[1:], terms[0]) % size + first)
        return torch.stack(rows, dim=-1).masked_fill(input_ids[..., None] < 0, MISSING)

    def other_rows(self, layer: int, control: str) -> Callable[[Tensor], Tensor]:
        draw = random.Random(f"{NAME} {control}")
        distances = [draw.randrange(1, size) for size in self.sizes]
        return shuffled_within(*map(torch.tensor, (self.sizes, self.first, distances)))


class OverEncodingKind(TokenRowsKind):
    """One table of rows, in which the K hash tables follow each other; layer 0 reads it."""

    name = NAME
    title = "over-encoding"
    exported = ExportedTokenRows

    def layers(self, shape: Shape) -> tuple[int, ...]:
        return () if shape.get(NAME) is None else (LAYER,)

    def module(self, shape: Shape, layer: int) -> OverEncoding:
        return OverEncoding(shape)

    def addresses(self, shape: Shape) -> TokenAddresses:
        return NgramSums(shape)

    def look_back(self, shape: Shape) -> int:
        return shape.over_encoding.max_order - 1

    def tables(self, shape: Shape) -> dict[str, TableShape]:
        width = shape.hidden_size // _tables(shape)
        return {f"layers.{LAYER}.{NAME}.table": TableShape(LAYER, sum(table_sizes(shape)), width)}

    def init_std(self, shape: Shape) -> float:
        std = shape.over_encoding.init_std
        return shape.init_std if std is None else std

    def row_values(self, shape: Shape, layer: int) -> int:
        return shape.hidden_size


def table_sizes(shape: Shape) -> list[int]:
    """Rows of each hash table."""
    return [shape.over_encoding.rows + 2 * table + 1 for table in range(_tables(shape))]


def _tables(shape: Shape) -> int:
    return (shape.over_encoding.max_order - 1) * shape.over_encoding.tables_per_order
