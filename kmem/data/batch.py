"""A batch of sequences for the model."""

from dataclasses import dataclass

from torch import Tensor

IGNORED_LABEL = -100
"""Label of a position that is neither trained nor scored; the default `ignore_index` of PyTorch's cross entropy."""


@dataclass(frozen=True)
class SequenceBatch:
    """n packed sequences of T tokens; every tensor except `padding` is int64 [n, T]."""

    input_ids: Tensor
    """Token ids."""
    labels: Tensor
    """The token after each position. IGNORED_LABEL where that token belongs to another document (only with
    `data.document_attention`) and at padding."""
    position_ids: Tensor
    """Position within the document, counted from the document's first token in this row; without
    `data.document_attention`, 0..T-1 over the whole row."""
    document_ids: Tensor
    """Number of the document in its row, from 0; all 0 without `data.document_attention`."""
    addresses: Tensor | None = None
    """The leaf of the cluster tree that the document or window of each position belongs to; padding has the leaf of the
    row's last token. None if the data carries no addresses."""
    padding: Tensor | None = None
    """bool [n, T], True at positions after the last token of a row; None if no row has any."""
