"""Over-encoding: hashed n-grams that are added to the input embedding."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt

from kmem.config.memory import MemorySection

if TYPE_CHECKING:
    from kmem.config.model import ModelConfig


class OverEncodingConfig(MemorySection):
    """Rows of hashed n-grams, added to the input embedding (Over-Tokenized Transformer, arXiv 2501.16975; the n-gram
    embeddings of LongCat, arXiv 2601.21204).

    There are T = (max_order - 1) * tables_per_order hash tables. Table t has rows + 2 t + 1 rows of
    hidden_size / T values, so all tables differ in size. `docs/over_encoding.md` has the formulas.
    """

    max_order: Annotated[int, Field(ge=2)] = 3
    """Length of the longest n-grams; all lengths from 2 on have tables (papers: 3 to 5)."""
    tables_per_order: PositiveInt = 2
    """Hash tables for each length (papers: at least 2)."""
    rows: PositiveInt
    """Rows of a table, before its 2 t + 1 are added. Keep it far from integer multiples of the vocabulary: there
    many n-grams share a row."""
    normalization: Literal["mean", "root"] = "mean"
    """What the sum of the embedding and the T tables is divided by: T + 1, or its square root."""
    amplification: Literal["none", "root", "norm"] = "none"
    """What follows: nothing, the factor sqrt(hidden_size), or an RMSNorm (the paper has a LayerNorm)."""
    init_std: NonNegativeFloat | None = None
    """Standard deviation of the initial rows. Default: `model.init_std`."""

    def check_model(self, model: "ModelConfig") -> None:
        tables = (self.max_order - 1) * self.tables_per_order
        if model.hidden_size % tables:
            raise ValueError(
                f"over_encoding: {tables} tables ((max_order - 1) * tables_per_order) do not divide "
                f"hidden_size={model.hidden_size}; change one of them"
            )
        if model.vocab_size is not None and (self.rows + 2 * tables) * model.vocab_size >= 2**62:
            raise ValueError(f"over_encoding.rows={self.rows}: products of ids and rows must fit in 62 bits")
