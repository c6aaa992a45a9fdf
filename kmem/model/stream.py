"""The tensor that goes from layer to layer: the residual stream, and beside it the input embedding, if a memory of a
later layer reads that. A pipeline stage gets nothing else from the one before."""

import torch
from torch import Tensor

from .hyper_connections import collapse_branches, expand_branches
from .memory_kinds import carries_embedding
from .shape import Shape

# Shape letters: B sequences, T tokens, H hidden size, M branches of the residual stream.


def open_stream(embedding: Tensor, shape: Shape) -> Tensor:
    """Input embedding [B, T, H] -> the stream: [B, T, H], with branches [B, T, M, H]; with the embedding as a further
    branch [B, T, M + 1, H]."""
    hidden = expand_branches(embedding, shape.branches)
    return join_stream(hidden, embedding if carries_embedding(shape) else None)


def split_stream(stream: Tensor, shape: Shape) -> tuple[Tensor, Tensor | None]:
    """The stream -> (hidden [B, T, H] or [B, T, M, H], the carried embedding [B, T, H] or None)."""
    if not carries_embedding(shape):
        return stream, None
    branches, (embedding,) = stream[:, :, :-1], stream[:, :, -1:].unbind(2)
    return branches.squeeze(2) if shape.branches == 1 else branches, embedding


def join_stream(hidden: Tensor, embedding: Tensor | None) -> Tensor:
    """The inverse of `split_stream`."""
    if embedding is None:
        return hidden
    return torch.cat((hidden[:, :, None] if hidden.dim() == 3 else hidden, embedding[:, :, None]), dim=2)


def close_stream(stream: Tensor, shape: Shape) -> Tensor:
    """The last layer's stream -> what the final norm reads, [B, T, H]."""
    return collapse_branches(split_stream(stream, shape)[0], shape.branches)
