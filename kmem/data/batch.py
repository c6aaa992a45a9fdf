"""Sequences as the model reads them."""

from dataclasses import dataclass

from torch import Tensor

IGNORED_LABEL = -100
"""Label of a position that is not trained or scored; the default `ignore_index` of PyTorch's cross entropy."""


@dataclass(frozen=True)
class SequenceBatch:
    """n packed sequences of T tokens; every tensor is int64 of shape [n, T], but for `padding`."""

    input_ids: Tensor
    """Token ids."""
    labels: Tensor
    """The next token of each position. IGNORED_LABEL where the next token belongs to another document (only with
    `data.document_attention`) and over padding."""
    position_ids: Tensor
    """Position within the document, counted from the document's first token in this row; 0..T-1 over the whole row
    without `data.document_attention`."""
    document_ids: Tensor
    """Documents of a row, numbered from 0 in each row; all 0 without `data.document_attention`."""
    addresses: Tensor | None = None
    """The leaf of the cluster tree that the document or window of each position belongs to; over padding, that of the
    row's last token. None where the data carries no addresses."""
    padding: Tensor | None = None
    """bool [n, T], True at positions after the last token of a row; None where no row has any."""
