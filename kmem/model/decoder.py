"""The decoder-only language model: embedding, pre-norm layers, final norm and head."""

from collections.abc import Mapping

from torch import Tensor, nn

from .attention import KeyValueCache, build_attention
from .bank_blocks import BankInput
from .chain_of_experts import ChainOfExperts
from .engram import Engram, EngramInput
from .feed_forward import FeedForward
from .hyper_connections import HyperConnection, collapse_branches, expand_branches
from .loss import linear_cross_entropy
from .matmul import Linear, linear
from .moe import MoE
from .norm import RMSNorm
from .rope import Rotation, rotation
from .shape import Shape


class Embedding(nn.Embedding):
    """Token ids [B, T] -> hidden [B, T, H]."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape.vocab_size, shape.hidden_size)


class DecoderLayer(nn.Module):
    """x + memory(x), where the layer has one, x + attention(norm(x)), then x + feed_forward(norm(x)); the feed-forward
    is dense, a MoE or a chain of experts, which contains its residual connection.

    With hyper-connections x has M branches: attention and feed-forward read a mixture of them, and the memory updates
    each. Blocks of a memory bank belong to the attention or the feed-forward, and read what that reads.
    `local_experts` are the global numbers of the experts held here (default: all).
    """

    def __init__(self, shape: Shape, index: int, local_experts: range | None = None) -> None:
        super().__init__()
        self.shape = shape
        self.engram = build_engram(shape) if shape.has_engram(index) else None
        self.has_bank = index in shape.bank_layers
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
        mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
        rotary: Rotation | None = None,
        engram: EngramInput | None = None,
        bank: BankInput | None = None,
    ) -> Tensor:
        """hidden [B, T, H] or [B, T, M, H], position_ids int64 [B, T] -> the same shape.

        mask: bool [B, 1, T, S], True where a query may attend; None is plain causal attention. `rotary` is
        `rotation(shape, position_ids)` where the caller computes it once for all layers. `engram` holds the rows of a
        layer that has a memory, `bank` the blocks of one that has some of a memory bank.
        """
        rotated = rotation(self.shape, position_ids) if rotary is None else rotary
        if self.engram is not None:
            assert engram is not None, "a layer with a memory needs its rows"
            hidden = hidden + self.engram(hidden, engram)
        assert self.has_bank == (bank is not None), "layers with a memory bank, and no others, need their blocks"

        def attend(x: Tensor) -> Tensor:
            return self.attention(self.attention_norm(x), rotated, mask, cache, bank)

        hidden = self.attention_connection(hidden, attend)
        if isinstance(self.feed_forward, ChainOfExperts):
            return self._feed_forward(hidden, bank)
        return self.feed_forward_connection(hidden, lambda x: self._feed_forward(x, bank))

    def _feed_forward(self, x: Tensor, bank: BankInput | None) -> Tensor:
        """Norm and feed-forward [B, T, H]; a chain of experts adds x itself."""
        normed, feed_forward = self.feed_forward_norm(x), self.feed_forward
        if isinstance(feed_forward, ChainOfExperts):
            out = feed_forward(x, normed)
        elif isinstance(feed_forward, FeedForward):
            out = feed_forward(normed, bank)
        else:
            out = feed_forward(normed)
        return out if bank is None else bank.widen(normed, out)


def build_engram(shape: Shape) -> Engram:
    """The memory of a layer, without its table."""
    engram = shape.engram
    return Engram(
        shape.hidden_size,
        len(engram.orders) * engram.heads * engram.row_dim,
        shape.branches,
        norm_eps=shape.norm_eps,
        conv_dilation=engram.conv_dilation or engram.orders[-1],
        bias=engram.bias,
        zero_centered_norm=engram.zero_centered_norm,
        conv_kernel=engram.conv_kernel,
        conv_within_documents=engram.conv_within_documents,
    )


def build_connection(shape: Shape) -> HyperConnection:
    """The connection around a sublayer; with one branch the plain residual, without parameters."""
    section = shape.get("hyper_connections")
    chosen = {} if section is None else {name: value for name, value in section.items() if name != "branches"}
    return HyperConnection(shape.hidden_size, shape.branches, norm_eps=shape.norm_eps, **chosen)


def build_feed_forward(shape: Shape, index: int, local_experts: range | None) -> FeedForward | MoE | ChainOfExperts:
    """The feed-forward of layer `index`."""
    if not shape.has_experts(index):
        return FeedForward(shape.hidden_size, shape.intermediate_size)
    return MoE(shape, local_experts) if shape.chain is None else ChainOfExperts(shape, local_experts)


class Head(nn.Module):
    """Final norm and projection to the vocabulary. With tied embeddings the projection is the given embedding's matrix,
    which stays that module's parameter."""

    def __init__(self, shape: Shape, embedding: Embedding | None = None) -> None:
        super().__init__()
        assert shape.tie_embeddings == (embedding is not None), "a tied head, and no other, is given the embedding"
        self.branches = shape.branches
        self.norm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.head = None if shape.tie_embeddings else Linear(shape.hidden_size, shape.vocab_size, bias=False)
        self._tied_to = (embedding,)  # in a tuple, so that it is not registered as a second owner

    @property
    def projection_weight(self) -> Tensor:
        """[V, H]."""
        owner = self._tied_to[0] if self.head is None else self.head
        assert owner is not None
        return owner.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [B, T, H] or [B, T, M, H] of the last layer -> logits [B, T, V]."""
        return linear(self.normed(hidden), self.projection_weight)

    def loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Summed cross entropy (fp32 scalar) of the last layer's hidden against labels int64 [B, T]; -100 is left
        out."""
        return linear_cross_entropy(self.normed(hidden), self.projection_weight, labels)

    def normed(self, hidden: Tensor) -> Tensor:
        """The branches of hidden [B, T, H] or [B, T, M, H] collapsed and normed, [B, T, H]."""
        return self.norm(collapse_branches(hidden, self.branches))


class Decoder(Head):
    """The whole model; its parameters carry the canonical names."""

    def __init__(self, shape: Shape) -> None:
        embedding = Embedding(shape)
        super().__init__(shape, embedding if shape.tie_embeddings else None)
        self.shape = shape
        self.embedding = embedding
        self.layers = nn.ModuleList(DecoderLayer(shape, index) for index in range(shape.num_layers))

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
        engram: Mapping[int, EngramInput] | None = None,
        bank: Mapping[int, BankInput] | None = None,
    ) -> Tensor:
        """Token ids and positions [B, T] -> the last layer's hidden [B, T, H] or, with M branches, [B, T, M, H], for
        `logits` or `loss`. By layer, `engram` is what `EngramReader.read` has for these tokens, and `bank` what
        `FetchedBlocks.inputs` has."""
        hidden = expand_branches(self.embedding(input_ids), self.branches)
        rotary = rotation(self.shape, position_ids)
        for index, layer in enumerate(self.layers):
            rows, blocks = (engram or {}).get(index), (bank or {}).get(index)
            hidden = layer(hidden, position_ids, mask, cache, rotary, rows, blocks)
        return hidden
