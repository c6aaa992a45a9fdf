"""Product-key memory: a pool of rows that the hidden state chooses from, shared by some layers."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from kmem.config.memory import MemorySection, check_layers
from kmem.config.section import Width
from kmem.config.tables import TableConfig

if TYPE_CHECKING:
    from kmem.config.model import ModelConfig


class ProductKeyMemoryConfig(MemorySection):
    """A pool of num_keys^2 rows of hidden_size values in place of the feed-forward of the chosen layers (Memory+, arXiv
    2412.09764; product keys, arXiv 1907.05242). `docs/product_key_memory.md` has the formulas.

    The hidden state chooses the rows, so they cannot be fetched ahead.
    """

    layers: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)]
    """Decoder layers that share the pool, counted from 0 (the paper: 4, 12 and 20 of 22)."""
    num_keys: Width = 1024
    """Keys of each half of a query; the pool has num_keys^2 rows."""
    key_dim: Annotated[int, Field(ge=2, le=1 << 20)] = 512
    """Values of a query, which is cut into halves; must be even."""
    heads: Width = 4
    """Queries of a token in a layer."""
    top_k: PositiveInt = 32
    """Rows that a query takes."""
    qk_norm: bool = False
    """RMSNorm of the halves of queries and of keys."""

    def check(self) -> None:
        if self.key_dim % 2:
            raise ValueError(f"key_dim={self.key_dim} must be even: queries are cut into halves")
        if self.top_k > self.num_keys:
            raise ValueError(f"top_k={self.top_k} exceeds num_keys={self.num_keys}, the choices of half a query")

    def check_model(self, model: "ModelConfig") -> None:
        check_layers("product_key_memory.layers", self.layers, model)

    def replaced_layers(self, model: "ModelConfig") -> tuple[int, ...]:
        return self.layers


class PoolTableConfig(TableConfig):
    """The table of a pool that layers look up in the forward pass: where rows live and how they are trained. Look-ups
    wait for the rows, so stores other than `device` slow the forward pass down."""

    store: Literal["device", "host", "mmap"] = "device"
    """Where a rank keeps its rows and their optimizer state: device memory, host memory, or a mapped file."""
    prefetch_depth: Annotated[int, Field(ge=0, le=0)] = 0
    """Always 0: the rows of a step are known when its layers have run."""
