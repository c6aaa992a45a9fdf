"""Per-layer embeddings: a vector per token id in each layer, in the forms of Gemma 3n and of STEM."""

import random
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .matmul import Linear
from .memory_kind import MemoryModule, TableShape
from .norm import RMSNorm
from .shape import Shape
from .swiglu import silu_times
from .token_rows import ExportedTokenRows, TokenAddresses, TokenRows, TokenRowsKind

# Shape letters: B sequences, T tokens, H hidden size, M branches, p width of a vector.

NAME = "per_layer_embeddings"


class GatedUpdate(MemoryModule):
    """Gemma 3n's form. With t the token's vector, e the input embedding and h the end of the layer:

        u = (RMSNorm(W_ctx e) + sqrt(p) t) / sqrt(2)
        h <- h + RMSNorm(W_o (gelu(W_g h) * u))

    Gemma 3n multiplies e by sqrt(H) and W_ctx e by 1 / sqrt(H); e is not scaled here, so neither factor is needed. It
    shares the weights of the first norm among the layers; here each layer has its own. With branches, the update reads
    their mean and is added to each.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        hidden, self.width = shape.hidden_size, shape.per_layer_embeddings.width
        self.context_proj = Linear(hidden, self.width, bias=False)
        self.context_norm = RMSNorm(self.width, shape.norm_eps)
        self.gate_proj = Linear(hidden, self.width, bias=False)
        self.out_proj = Linear(self.width, hidden, bias=False)
        self.out_norm = RMSNorm(hidden, shape.norm_eps, shape.per_layer_embeddings.output_scale)

    def leave(self, hidden: Tensor, embedding: Tensor | None, read: TokenRows) -> Tensor:
        assert embedding is not None
        context = self.context_norm(self.context_proj(embedding))
        vector = read.rows.squeeze(-2).to(context.dtype) * self.width**0.5
        known = (context + vector) * 2**-0.5
        taken = hidden if hidden.dim() == 3 else hidden.mean(2)
        update = self.out_norm(self.out_proj(F.gelu(self.gate_proj(taken), approximate="tanh") * known))
        return hidden + (update if hidden.dim() == 3 else update.unsqueeze(2))


class StemFeedForward(MemoryModule):
    """STEM's form, in place of the feed-forward: W_d (silu(W_g x) * E[token])."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def feed(self, x: Tensor, out: Tensor | None, read: TokenRows) -> Tensor:
        gate = self.gate_proj(x)
        return self.down_proj(silu_times(gate, read.rows.squeeze(-2).to(gate.dtype)))


class TokenIds:
    """The row of a token is its id."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def row_ids(self, layer: int, input_ids: Tensor, document_ids: Tensor | None = None) -> Tensor:
        return input_ids[..., None]

    def other_rows(self, layer: int, control: str) -> Callable[[Tensor], Tensor]:
        distance = random.Random(f"{NAME} {control} {layer}").randrange(1, self.vocab_size)
        return lambda rows: (rows + distance) % self.vocab_size


class PerLayerEmbeddingsKind(TokenRowsKind):
    """One table per layer with a row per token id."""

    name = NAME
    title = "per-layer embeddings"
    exported = ExportedTokenRows

    def layers(self, shape: Shape) -> tuple[int, ...]:
        section = shape.get(NAME)
        if section is None:
            return ()
        return tuple(range(shape.num_layers)) if section.layers is None else tuple(sorted(section.layers))

    def module(self, shape: Shape, layer: int) -> MemoryModule:
        return StemFeedForward(shape) if self.replaces_feed_forward(shape, layer) else GatedUpdate(shape)

    def replaces_feed_forward(self, shape: Shape, layer: int) -> bool:
        return shape.per_layer_embeddings.form == "stem"

    def carries_embedding(self, shape: Shape) -> bool:
        return shape.per_layer_embeddings.form == "gemma3n"

    def addresses(self, shape: Shape) -> TokenAddresses:
        return TokenIds(shape.vocab_size)

    def tables(self, shape: Shape) -> dict[str, TableShape]:
        width = self.row_values(shape, 0)
        return {
            f"layers.{layer}.{NAME}.table": TableShape(layer, shape.vocab_size, width) for layer in self.layers(shape)
        }

    def init_std(self, shape: Shape) -> float:
        std = shape.per_layer_embeddings.init_std
        return shape.init_std if std is None else std

    def row_values(self, shape: Shape, layer: int) -> int:
        section: Any = shape.per_layer_embeddings
        return shape.intermediate_size if section.form == "stem" else section.width
