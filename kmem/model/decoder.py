"""The decoder-only language model: embedding, pre-norm layers, final norm and head."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from .attention import KeyValueCache, build_attention
from .chain_of_experts import ChainOfExperts
from .feed_forward import FeedForward
from .hyper_connections import HyperConnection
from .loss import linear_cross_entropy
from .mask import Documents
from .matmul import Linear, linear
from .memory_kind import LayerMemories, MemoryModule
from .memory_kinds import layer_kinds, replaces_feed_forward
from .moe import MoE
from .norm import RMSNorm
from .rope import Rotation, rotation
from .shape import Shape
from .stream import close_stream, join_stream, open_stream, split_stream

# Shape letters: B sequences, T tokens, S tokens with keys, H hidden size, M branches of the residual stream, V
# vocabulary.

_NOTHING: Mapping[str, Any] = MappingProxyType({})


class Embedding(nn.Embedding):
    """Token ids [B, T] -> hidden [B, T, H]. Also the projection of a tied head: hidden [.., H] -> logits [.., V].

    Both are calls of the module, because hooks that move weights in and out of memory (`device_map`) see only calls.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape.vocab_size, shape.hidden_size)

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight) if input.is_floating_point() else super().forward(input)


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)), with memories at the places that `memory_kind` lists. The
    feed-forward is dense, a MoE, a chain of experts, or a memory that replaces it. A chain of experts contains its own
    residual connection.

    With hyper-connections, x has M branches, and attention and feed-forward read a mixture of them. `local_experts`:
    global numbers of the experts held here (default: all).
    """

    def __init__(self, shape: Shape, index: int, local_experts: range | None = None) -> None:
        super().__init__()
        self.shape = shape
        for kind in layer_kinds(shape, index):
            self.add_module(kind.name, kind.module(shape, index))
        self.attention_connection = build_connection(shape)
        self.attention_norm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.attention = build_attention(shape, index)
        self.feed_forward_connection = build_connection(shape)
        self.feed_forward_norm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.feed_forward = build_feed_forward(shape, index, local_experts)

    def forward(
        self,
        hidden: Tensor,
        position_ids: Tensor,
        mask: Tensor | Documents | None = None,
        cache: KeyValueCache | None = None,
        rotary: Rotation | None = None,
        memories: Mapping[str, Any] = _NOTHING,
    ) -> Tensor:
        """hidden [B, T, H], [B, T, M, H] or a stream as in `open_stream`, position_ids int64 [B, T] -> the same shape.

        `mask`: bool [B, 1, T, S], True where a query may attend, or documents; None means plain causal attention.
        `rotary`: `rotation(shape, position_ids)`, if the caller computes it once for all layers. `memories`: name of
        each kind of memory of this layer -> the input that it reads.
        """
        rotated = rotation(self.shape, position_ids) if rotary is None else rotary
        read = LayerMemories(self.memories, memories)
        hidden, embedding = split_stream(hidden, self.shape)
        hidden = read.enter(hidden)
        hidden = self.attention_connection(
            hidden, lambda x: self.attention(self.attention_norm(x), rotated, mask, cache, read)
        )
        if isinstance(self.feed_forward, ChainOfExperts):
            hidden = self._feed_forward(hidden, read)
        else:
            hidden = self.feed_forward_connection(hidden, lambda x: self._feed_forward(x, read))
        return join_stream(read.leave(hidden, embedding), embedding)

    @property
    def memories(self) -> dict[str, MemoryModule]:
        """Name of the kind -> module of each memory of this layer, in the order in which they are called."""
        return {name: module for name, module in self.named_children() if isinstance(module, MemoryModule)}

    def _feed_forward(self, x: Tensor, memories: LayerMemories) -> Tensor:
        """Norm and feed-forward [B, T, H]; a chain of experts adds x itself."""
        normed, feed_forward = self.feed_forward_norm(x), self.feed_forward
        out = None
        if isinstance(feed_forward, ChainOfExperts):
            out = feed_forward(x, normed)
        elif isinstance(feed_forward, FeedForward):
            out = feed_forward(normed, memories)
        elif feed_forward is not None:
            out = feed_forward(normed)
        return memories.feed(normed, out)


def build_connection(shape: Shape) -> HyperConnection:
    """The connection around a sublayer. With one branch it is the plain residual and has no parameters."""
    section = shape.get("hyper_connections")
    chosen = {} if section is None else {name: value for name, value in section.items() if name != "branches"}
    return HyperConnection(shape.hidden_size, shape.branches, norm_eps=shape.norm_eps, **chosen)


def build_feed_forward(
    shape: Shape, index: int, local_experts: range | None
) -> FeedForward | MoE | ChainOfExperts | None:
    """The feed-forward of layer `index`; None if a memory replaces it."""
    if replaces_feed_forward(shape, index):
        return None
    if not shape.has_experts(index):
        return FeedForward(shape.hidden_size, shape.intermediate_size)
    return MoE(shape, local_experts) if shape.chain is None else ChainOfExperts(shape, local_experts)


class Head(nn.Module):
    """Final norm and projection to the vocabulary. With tied embeddings, the projection is the matrix of the given
    embedding, which keeps the parameter."""

    def __init__(self, shape: Shape, embedding: Embedding | None = None) -> None:
        super().__init__()
        assert shape.tie_embeddings == (embedding is not None), "give the embedding to a tied head, and to no other"
        self.shape = shape
        self.norm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.head = None if shape.tie_embeddings else Linear(shape.hidden_size, shape.vocab_size, bias=False)
        self._tied_to = (embedding,)  # in a tuple, so that it is not registered as a submodule

    @property
    def projection_weight(self) -> Tensor:
        """[V, H]."""
        owner = self._tied_to[0] if self.head is None else self.head
        assert owner is not None
        return owner.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """The last layer's hidden [B, T, H] or [B, T, M, H] -> logits [B, T, V]."""
        return linear(self.normed(hidden), self.projection_weight)

    def loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Summed cross entropy (fp32 scalar) of the last layer's hidden against labels int64 [B, T]; -100 does not
        count."""
        return linear_cross_entropy(self.normed(hidden), self.projection_weight, labels)

    def normed(self, hidden: Tensor) -> Tensor:
        """The norm of the last layer's stream, [B, T, H]."""
        return self.norm(close_stream(hidden, self.shape))


class Decoder(Head):
    """The whole model; its parameters carry the canonical names."""

    def __init__(self, shape: Shape) -> None:
        embedding = Embedding(shape)
        super().__init__(shape, embedding if shape.tie_embeddings else None)
        self.embedding = embedding
        self.layers = nn.ModuleList(DecoderLayer(shape, index) for index in range(shape.num_layers))

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        mask: Tensor | Documents | None = None,
        cache: KeyValueCache | None = None,
        memories: Mapping[str, Mapping[int, Any]] = _NOTHING,
    ) -> Tensor:
        """Token ids and positions [B, T] -> the last layer's hidden [B, T, H] or, with M branches, [B, T, M, H], for
        `logits` or `loss`. `memories`: kind -> layer -> the input that the memory reads for these tokens."""
        hidden = open_stream(self.embedding(input_ids), self.shape)
        rotary = rotation(self.shape, position_ids)
        for index, layer in enumerate(self.layers):
            read = {kind: by_layer[index] for kind, by_layer in memories.items() if index in by_layer}
            hidden = layer(hidden, position_ids, mask, cache, rotary, read)
        return hidden
