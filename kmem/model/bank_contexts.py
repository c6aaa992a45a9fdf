"""Contexts and clusters in the forms that callers of a model with a bank pass. Ships beside exported weights."""

from collections.abc import Iterable, Sequence

from torch import Tensor

from .bank_router import Context
from .bank_tree import ClusterPath, parse_path

Contexts = str | Tensor | Sequence[Context]
"""One text, several texts, lists of token ids, or token ids int64 [B, T] (B contexts of T tokens)."""


def cluster_paths(paths: Iterable[ClusterPath | str]) -> tuple[ClusterPath, ...]:
    """Paths as tuples; each may be given as a tuple or as text such as `3.7`."""
    if isinstance(paths, str):
        raise ValueError(f"clusters {paths!r}: give a list of paths, such as [{paths!r}]")
    return tuple(parse_path(path) if isinstance(path, str) else tuple(path) for path in paths)


def as_contexts(context: Contexts, mask: Tensor | None = None) -> list[Context]:
    """A list of single contexts; `mask` [B, T] is 0 where a token of the ids [B, T] is padding."""
    if mask is not None and not isinstance(context, Tensor):
        raise ValueError("attention_mask works with contexts given as token ids [B, T] only")
    if isinstance(context, str):
        return [context]
    if isinstance(context, Tensor):
        ids = context if context.dim() == 2 else context[None]
        if mask is None:
            return list(ids.cpu())
        if mask.numel() != ids.numel():
            raise ValueError(
                f"attention_mask has shape {list(mask.shape)} and the token ids {list(ids.shape)}: give a mask [B, T], "
                "or addresses, or call fetch(context) first"
            )
        present = mask.bool().cpu().view(ids.shape)
        return [row[kept] for row, kept in zip(ids.cpu(), present, strict=True)]
    if len(context) and isinstance(context[0], int):
        raise ValueError("this is one context of token ids: give a list of contexts, or a tensor [B, T]")
    return list(context)
