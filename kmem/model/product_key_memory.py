"""Product-key memory: a pool of rows, shared by some layers, in place of their feed-forward (Memory+, arXiv 2412.09764;
product keys, arXiv 1907.05242).

A query is cut into halves, and each half is compared with n keys. The best k of each half give k^2 pairs, whose scores
are sums; the best k of these pairs are rows of the pool: pair (i, j) is row i n + j.
"""

import random
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .export_tables import RowSource
from .exported_memory import Carried, ExportedMemory, ForwardTokens
from .matmul import Linear
from .memory_kind import MemoryModule, ModelKind, TableShape
from .norm import RMSNorm
from .router import stable_top_k
from .shape import Shape
from .swiglu import silu_times

# Shape letters: B sequences, T tokens, N = B * T, H hidden size, h heads, n keys of a half, d values of half a query, k
# rows of a query.

NAME = "product_key_memory"
TABLE = f"{NAME}.values"


class Pool(Protocol):
    """What a layer reads: a function that looks rows up."""

    def __call__(self, ids: Tensor, weights: Tensor) -> Tensor:
        """Row ids int64 [N, h, k] and weights fp32 [N, h, k] -> the weighted sum of each token's rows, fp32 [N, H]."""


class ProductKeyMemory(MemoryModule):
    """W_2 (y * silu(W_1 x)), where y is the weighted sum of the rows that the queries W_q x choose."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        section, hidden = shape.product_key_memory, shape.hidden_size
        self.heads, self.top_k, self.count = section.heads, section.top_k, section.num_keys
        half = section.key_dim // 2
        self.query_proj = Linear(hidden, section.heads * section.key_dim)
        self.keys = nn.Parameter(torch.empty(section.heads, 2, section.num_keys, half))
        self.query_norm = RMSNorm(half, shape.norm_eps) if section.qk_norm else None
        self.key_norm = RMSNorm(half, shape.norm_eps) if section.qk_norm else None
        self.gate_proj = Linear(hidden, hidden, bias=False)
        self.out_proj = Linear(hidden, hidden, bias=False)
        self.initial_draws = {
            "query_proj.weight": ("uniform", (6 / (hidden + section.heads * section.key_dim)) ** 0.5),  # Xavier
            "keys": ("uniform", section.key_dim**-0.5),
            "gate_proj.weight": ("normal", hidden**-0.5),
            "out_proj.weight": ("normal", hidden**-0.5),
        }

    def feed(self, x: Tensor, out: Tensor | None, read: Pool) -> Tensor:
        return self(x, read)  # a call, because hooks that move weights see only calls

    def forward(self, x: Tensor, read: Pool) -> Tensor:
        """x [B, T, H] -> [B, T, H]."""
        ids, weights = self.choose(x)
        rows = read(ids, weights).to(x.dtype).view_as(x)
        return self.out_proj(silu_times(self.gate_proj(x), rows))

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden [B, T, H] -> (row ids int64 [N, h, k], best first; their softmax weights, fp32 [N, h, k])."""
        queries = self.query_proj(x).view(-1, self.heads, 2, self.keys.shape[-1])
        keys = self.keys
        if self.query_norm is not None and self.key_norm is not None:
            queries, keys = self.query_norm(queries), self.key_norm(keys)
        scores = torch.einsum("nhsd,hskd->nhsk", queries, keys).float()
        halves = stable_top_k(scores.detach(), self.top_k)
        first, second = scores.gather(-1, halves).unbind(2)
        sums = (first[..., :, None] + second[..., None, :]).flatten(-2)
        best = stable_top_k(sums.detach(), self.top_k)
        rows, columns = halves.unbind(2)
        ids = rows.gather(-1, best // self.top_k) * self.count + columns.gather(-1, best % self.top_k)
        return ids, sums.gather(-1, best).softmax(-1)


def weighted_rows(rows: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """rows [U, H], index int64 [N, h, k] into them, weights fp32 [N, h, k] -> the weighted sums [N, H]."""
    return F.embedding_bag(index.flatten(1), rows.float(), per_sample_weights=weights.flatten(1), mode="sum")


class SourcedPool:
    """A pool in one process: every distinct row is read once."""

    def __init__(self, source: RowSource) -> None:
        self._source = source

    def __call__(self, ids: Tensor, weights: Tensor) -> Tensor:
        distinct, index = torch.unique(ids, return_inverse=True)
        return weighted_rows(self._source(distinct).to(weights.device), index, weights)


def shuffled(pool: Pool, shape: Shape) -> Pool:
    """The pool under the control "shuffled": every look-up reads the row at a fixed distance."""
    rows = shape.product_key_memory.num_keys**2
    distance = random.Random(f"{NAME} shuffled").randrange(1, max(2, rows))
    return lambda ids, weights: pool((ids + distance) % rows, weights)


class ExportedPool(ExportedMemory):
    """The pool needs nothing beside its rows."""

    def read(self, tokens: ForwardTokens, carried: Carried | None) -> dict[int, Any]:
        (source,) = self.sources.values()
        pool: Pool = SourcedPool(source)
        if self.control == "shuffled":
            pool = shuffled(pool, self.shape)
        return dict.fromkeys(self.kind.layers(self.shape), pool)


class ProductKeyMemoryKind(ModelKind):
    """One table for all layers."""

    name = NAME
    title = "a product-key memory"
    controls = ("on", "off", "shuffled")
    """off: the layers have no feed-forward. shuffled: every look-up reads the row of another pair of keys."""
    exported = ExportedPool

    def layers(self, shape: Shape) -> tuple[int, ...]:
        section = shape.get(NAME)
        return () if section is None else tuple(sorted(section.layers))

    def module(self, shape: Shape, layer: int) -> ProductKeyMemory:
        return ProductKeyMemory(shape)

    def replaces_feed_forward(self, shape: Shape, layer: int) -> bool:
        return True

    def tables(self, shape: Shape) -> dict[str, TableShape]:
        return {TABLE: TableShape(self.layers(shape)[0], shape.product_key_memory.num_keys**2, shape.hidden_size)}

    def init_std(self, shape: Shape) -> float:
        return shape.hidden_size**-0.5

    def row_values(self, shape: Shape, layer: int) -> int:
        section = shape.product_key_memory
        return section.heads * section.top_k * shape.hidden_size

    def multiplied_values(self, shape: Shape, layer: int) -> int:
        return self.row_values(shape, layer)
