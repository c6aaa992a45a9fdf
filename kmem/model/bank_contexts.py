"""Contexts and clusters as callers of a model with a memory bank give them. Ships beside exported weights."""

from collections.abc import Iterable, Sequence

from torch import Tensor

from .bank_router import Context
from .bank_tree import ClusterPath, parse_path

Contexts = str | Tensor | Sequence[Context]
"""One text, texts, lists of token ids, or token ids int64 [B, T]."""


def cluster_paths(paths: Iterable[ClusterPath | str]) -> tuple[ClusterPath, ...]:
    """Paths, each a tuple or written as `3.7`."""
    if isinstance(paths, str):
        raise ValueError(f"clusters {paths!r}: give a list of paths, such as [{paths!r}]")
    return tuple(parse_path(path) if isinstance(path, str) else tuple(path) for path in paths)


def as_contexts(context: Contexts, mask: Tensor | None = None) -> list[Context]:
    """Contexts one by one; `mask` [B, T] is 0 where a token of ids [B, T] is padding."""
    if mask is not None and not isinstance(context, Tensor):
        raise ValueError("an attention_mask goes with contexts as token ids [B, T]")
    if isinstance(context, str):
        return [context]
    if isinstance(context, Tensor):
        ids = context if context.dim() == 2 else context[None]
        if mask is None:
            return list(ids.cpu())
        if mask.numel() != ids.numel():
            raise ValueError(
                f"attention_mask of shape {list(mask.shape)} does not say which of the tokens {list(ids.shape)} are "
                "padding: give a mask [B, T], or addresses, or fetch(context) first"
            )
        present = mask.bool().cpu().view(ids.shape)
        return [row[there] for row, there in zip(ids.cpu(), present, strict=True)]
    if len(context) and isinstance(context[0], int):
        raise ValueError("one context of token ids: give a list of contexts, or a tensor [B, T]")
    return list(context)
