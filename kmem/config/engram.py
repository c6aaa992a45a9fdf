"""Engram: which n-grams address which rows, and how the rows enter the residual stream."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from kmem.config.memory import MemorySection, check_layers
from kmem.config.section import Width

if TYPE_CHECKING:
    from kmem.config.model import ModelConfig
    from kmem.config.run import Config

# The demo of arXiv 2601.07372. Its 27B and 40B models have 2,262,400 and 7,239,680 rows per head of 80 values.
_DEEPSEEK: Mapping[str, Any] = {
    "orders": (2, 3),
    "heads": 8,
    "rows_per_head": 646_400,
    "row_dim": 64,
    "compression": True,
    "boundary": "none",
    "hash": "pcg64",
    "seed": 0,
    "row_multiple": 1,
    "bias": True,
    "zero_centered_norm": False,
    "conv_kernel": 4,
}
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "deepseek": _DEEPSEEK,
    # arXiv 2609.19969, sections 2.4.2 and 4.2
    "deepseek-v4.1": {
        **_DEEPSEEK,
        "orders": (2, 3, 4),
        "rows_per_head": 16_000_000,
        "row_dim": 256,
        "boundary": "document",
        "bias": False,
        "conv_kernel": 0,
    },
    # Qwen3.8-Flash-Next (Transformers: qwen4_exp)
    "qwen": {
        **_DEEPSEEK,
        "rows_per_head": 20_000_000,
        "row_dim": 160,
        "compression": False,
        "boundary": "eos",
        "hash": "splitmix64",
        "seed": 1234,
        "row_multiple": 128,
        "bias": False,
        "zero_centered_norm": True,
    },
}
"""Settings of the published models."""


class EngramConfig(MemorySection):
    """N-gram lookup (Engram, arXiv 2601.07372) at the entrance of the listed layers.

    Fields that are left out come from the preset; the saved configuration holds every value. `docs/engram.md` explains
    the fields.
    """

    preset: Literal["deepseek", "deepseek-v4.1", "qwen"] = "deepseek"
    """Source of the fields that are left out: the paper's demo, DeepSeek-V4.1-Flash or Qwen3.8-Flash-Next."""
    layers: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)]
    """Decoder layers that have an engram, counted from 0 (the paper's 2 and 15 are 1 and 14)."""
    orders: Annotated[tuple[Annotated[int, Field(ge=2)], ...], Field(min_length=1)] | None = None
    """Lengths of the n-grams, ascending."""
    heads: Annotated[int, Field(gt=0, le=10_000)] | None = None
    """Hash heads per order; each has its own rows."""
    rows_per_head: PositiveInt | Annotated[tuple[PositiveInt, ...], Field(min_length=1)] | None = None
    """Rows of a head: one number, or one number per order. Sizes are rounded up to primes, which differ between all
    heads of all layers."""
    row_dim: Width | None = None
    """Values per row; a token reads orders * heads rows."""
    compression: bool | None = None
    """Address by compressed ids: tokens that differ only in case, accents and blanks share an id."""
    boundary: Literal["none", "document", "eos"] | None = None
    """Where look-back ends. none: nowhere within a sequence. document: at a document's first token. eos: after an
    end-of-text token."""
    pad_token_id: NonNegativeInt | None = None
    """Token id of the tokenizer that stands for missing context. Default: its end-of-text token."""
    hash: Literal["pcg64", "splitmix64"] | None = None
    """How the multipliers of the hash are drawn: as DeepSeek does (pcg64) or as Qwen does (splitmix64)."""
    seed: NonNegativeInt | None = None
    """Seed of the multipliers."""
    seeding_ids: tuple[NonNegativeInt, ...] | None = None
    """Number that each layer contributes to its seed. Default: the layer, counted from 0; with splitmix64: 0, 1, .."""
    row_multiple: PositiveInt | None = None
    """Rows of a layer are padded up to a multiple of this."""
    bias: bool | None = None
    """Biases of the key and value projections."""
    zero_centered_norm: bool | None = None
    """Norms multiply by 1 + weight."""
    gate_norm_eps: PositiveFloat | None = None
    """Epsilon of the norms of the gate's query and key (the paper's demo: 1.2e-7). Default: model.norm_eps."""
    conv_norm_eps: PositiveFloat | None = None
    """Epsilon of the norm before the convolution (the paper's demo: 1e-5). Default: model.norm_eps."""
    conv_kernel: NonNegativeInt | None = None
    """Taps of the short causal convolution; 0 for none."""
    conv_dilation: PositiveInt | None = None
    """Tokens between two taps. Default: the largest order."""
    conv_within_documents: bool = False
    """Whether the taps stop at document boundaries. In the published models they do not."""
    init_std: NonNegativeFloat = 0.02
    """Standard deviation of the initial rows. With 0, an engram that is added to a trained model starts as an exact
    no-op."""

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        preset = values.get("preset", "deepseek")
        known = PRESETS.get(preset, {}) if isinstance(preset, str) else {}
        given = {name: value for name, value in values.items() if value is not None or name not in known}
        return {**known, **given}

    def check(self) -> None:
        assert self.orders is not None
        if list(self.orders) != sorted(set(self.orders)):
            raise ValueError(f"orders={list(self.orders)} must ascend")
        for name, entries, wanted in (
            ("seeding_ids", self.seeding_ids, len(self.layers)),
            ("rows_per_head", self.rows_per_head, len(self.orders)),
        ):
            if isinstance(entries, tuple) and len(entries) != wanted:
                what = "layers" if name == "seeding_ids" else "orders"
                raise ValueError(f"{name}={list(entries)} must have one entry for each of the {wanted} {what}")
        bases = self.rows_per_head if isinstance(self.rows_per_head, tuple) else (self.rows_per_head,)
        assert self.heads is not None
        if max(base or 1 for base in bases) > (2**63 - 1) // (2 * len(self.orders) * self.heads):
            raise ValueError(f"rows_per_head={self.rows_per_head}: the ids of all heads must fit in 64 bits")

    def check_model(self, model: "ModelConfig") -> None:
        check_layers("engram.layers", self.layers, model)
        if model.vocab_size is not None and (self.pad_token_id or 0) >= model.vocab_size:
            raise ValueError(f"engram.pad_token_id={self.pad_token_id} is no id of vocab_size={model.vocab_size}")

    def check_run(self, config: "Config") -> None:
        within = {"boundary": self.boundary == "document", "conv_within_documents": self.conv_within_documents}
        for name in (name for name, wanted in within.items() if wanted and not config.data.document_attention):
            raise ValueError(
                f"model.engram.{name}={getattr(self, name)} needs data.document_attention=true, without which a "
                "sequence counts as one document; set it to true, or choose boundary=eos or none"
            )
