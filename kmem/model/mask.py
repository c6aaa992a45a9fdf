"""Attention masks: bool [B, 1, T, S], True where a query may attend to a key. None means plain causal attention."""

import torch
from torch import Tensor

# Shape letters: B sequences, T tokens (queries), S tokens with keys, the cached ones included.


def document_mask(document_ids: Tensor) -> Tensor | None:
    """Causal attention within documents; `document_ids` [B, T] number the documents of each sequence.

    None if every sequence is one document: plain causal attention is then equal, and faster.
    """
    return packed_mask(document_ids) if several_documents(document_ids) else None


def several_documents(document_ids: Tensor) -> bool:
    """Whether any sequence of `document_ids` [B, T] holds more than one document."""
    return bool((document_ids != document_ids[:, :1]).any())


def packed_mask(document_ids: Tensor) -> Tensor:
    """Causal attention within documents of `document_ids` [B, T]; always returns a mask."""
    same = document_ids[:, None, :, None] == document_ids[:, None, None, :]
    return same.tril()


def padding_mask(attention_mask: Tensor, queries: int) -> Tensor | None:
    """Causal attention of the last `queries` tokens to the keys that `attention_mask` [B, S] marks with 1.

    A padded query attends only to itself, so that no row of the softmax is empty. None if nothing is padded.
    """
    if bool(attention_mask.all()):
        return None
    keys = attention_mask.shape[1]
    causal = torch.ones(queries, keys, dtype=torch.bool, device=attention_mask.device).tril(keys - queries)
    itself = causal & ~causal.tril(keys - queries - 1)
    return (causal & attention_mask[:, None, None, :].bool()) | itself


def padded_positions(attention_mask: Tensor) -> Tensor:
    """Position ids [B, S] that count the tokens marked with 1; padding before the first such token gets 0."""
    return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)
