"""Memory banks: blocks of weights, one per cluster of documents, that are fetched for a context and added to layers."""

from types import NoneType
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from kmem.config.memory import MemorySection, check_layers
from kmem.config.section import Section
from kmem.model.shape import Shape  # plain Python: where a bank has blocks is decided once, for runs and exports
from kmem.wording import counted

if TYPE_CHECKING:
    from kmem.config.model import ModelConfig
    from kmem.config.run import Config

LARGEST_ADDRESS = 2**31 - 1
"""Addresses of a dataset are stored as 32-bit integers."""


class GenericBlocks(Section):
    """A block of the fetched size that belongs to no cluster and is trained beside the bank: the control for 'more
    parameters and more tokens'."""

    probability: Annotated[float, Field(ge=0, le=1)] = 0.0
    """How often it replaces the fetched blocks in training (the paper: 1/17). 0: there is no generic block; 1: only the
    generic block is trained."""
    per: Literal["sequence", "batch"] = "sequence"
    """Whether to draw for each sequence, or once for all sequences of an optimizer step."""


class BankConfig(MemorySection):
    """Hierarchical memory bank (arXiv 2510.02375): a tree of clusters of documents, and for every cluster a block of
    weights in each of the chosen layers. A context uses the blocks on the path from the root to its leaf.

    Every kind starts as an exact no-op.
    """

    children: Annotated[int, Field(ge=2)] = 16
    """Children of each node of the tree."""
    levels: Annotated[tuple[Annotated[int, Field(ge=0, le=1 << 20)], ...], Field(min_length=1)]
    """Rank of the blocks of each level, from the root's children to the leaves; 0 leaves a level without blocks."""
    kind: Literal["ffn", "lora_ffn", "lora_qk", "lora_ov", "kv"] = "ffn"
    """What a block is. ffn: hidden units that widen the SwiGLU. lora_ffn: low-rank updates of the three feed-forward
    matrices. lora_qk: of the query and key projections. lora_ov: of the output and value projections. kv: keys and
    values that the queries attend to."""
    placement: Literal["uniform", "first", "middle", "last", "listed"] = "uniform"
    """Layers that have blocks: all layers, the first, middle or last `placed_layers`, or the layers it lists."""
    placed_layers: PositiveInt | Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] | None = None
    """first, middle, last: number of layers. listed: the layers, ascending, counted from 0. uniform: not given."""
    alpha: PositiveFloat = 2.0
    """lora_*: an update of rank r is multiplied by alpha / r."""
    anchor: Literal["train", "frozen"] = "train"
    """Whether the rest of the model is trained with the bank."""
    generic: GenericBlocks = GenericBlocks()
    """Blocks outside the tree, as a control."""

    def check(self) -> None:
        if not any(self.levels):
            raise ValueError(f"levels={list(self.levels)} leaves every level without blocks; give one a rank above 0")
        if self.children ** len(self.levels) > LARGEST_ADDRESS:
            raise ValueError(
                f"levels={list(self.levels)}: a tree of {counted(len(self.levels), 'level')} with "
                f"children={self.children} has more than {LARGEST_ADDRESS:,} leaves; use fewer levels or children"
            )
        placed = self.placed_layers
        shown = "null" if placed is None else list(placed) if isinstance(placed, tuple) else placed
        remedies: dict[str, tuple[type, str]] = {
            "uniform": (NoneType, "all layers are taken; choose first, middle, last or listed, or leave it out"),
            "listed": (tuple, "list the layers, as in [1, 14]"),
        }
        wanted, remedy = remedies.get(self.placement, (int, "give the number of layers"))
        if not isinstance(placed, wanted):
            raise ValueError(f"placed_layers={shown} with placement={self.placement}: {remedy}")
        if isinstance(placed, tuple) and list(placed) != sorted(set(placed)):
            raise ValueError(f"placed_layers={shown} must ascend")

    def check_run(self, config: "Config") -> None:
        if config.data.addresses is None:
            raise ValueError(
                "model.bank needs data.addresses, which select its blocks; name the folder of a tree that "
                "kmem data cluster has written, as in data.addresses.tree=data/tree"
            )

    def check_model(self, model: "ModelConfig") -> None:
        placed = self.placed_layers
        if isinstance(placed, tuple):
            check_layers("bank.placed_layers", placed, model)
        elif placed is not None and placed > model.num_layers:
            raise ValueError(f"bank.placed_layers={placed} exceeds num_layers={model.num_layers}")
        attention, moe = model.attention, model.moe
        if attention.kind == "mla" and self.kind in ("lora_qk", "lora_ov"):
            raise ValueError(
                f"bank.kind={self.kind} does not go with attention.kind=mla, whose keys and values are low-rank "
                "products already; use ffn, lora_ffn or kv"
            )
        if self.kind == "lora_ffn" and moe is not None:
            shape = Shape({**model.model_dump(), "bank": self.model_dump()})
            routed = [layer for layer in shape.bank_layers if shape.has_experts(layer)]
            if routed:
                raise ValueError(
                    f"bank.kind=lora_ffn updates a dense feed-forward, and layer {routed[0]} has experts; use "
                    f"kind=ffn, or place the bank below moe.first_dense_layers={moe.first_dense_layers}"
                )
        # The vectors that blocks are multiplied with.
        widths = {"hidden_size": model.hidden_size}
        if self.kind == "lora_ffn" and model.intermediate_size is not None:
            widths["intermediate_size"] = model.intermediate_size
        if self.kind in ("lora_qk", "lora_ov", "kv"):
            if attention.kind == "gqa":
                widths["attention.head_dim"] = attention.head_dim or model.hidden_size // attention.num_heads
            else:
                query = attention.qk_nope_head_dim + attention.qk_rope_head_dim
                widths["attention.qk_nope_head_dim + qk_rope_head_dim"] = query
                widths["attention.v_head_dim"] = attention.v_head_dim
        for name, size in widths.items():
            if size % 8:
                raise ValueError(
                    f"{name}={size} must be a multiple of 8 for a bank of kind={self.kind}: grouped products need "
                    "aligned rows"
                )
