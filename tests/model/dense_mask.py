"""The mask that defines attention within documents."""

import torch


def document_mask(document_ids: torch.Tensor) -> torch.Tensor | None:
    """bool [B, 1, T, T] of sequences whose documents [B, T] are numbered; None if each sequence is one document."""
    same = document_ids[:, None, :, None] == document_ids[:, None, None, :]
    return None if bool(same.all()) else same.tril()
