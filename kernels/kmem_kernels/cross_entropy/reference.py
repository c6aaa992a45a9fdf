"""The definition of the kernel, in torch."""

import torch
from torch import Tensor

# Shape letters: N tokens, V vocabulary.

IGNORED = -100
"""Label of a token without a target."""


def cross_entropy_(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """See `op.cross_entropy_`."""
    wide = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    counted, targets = labels_N != IGNORED, labels_N.clamp_min(0)[:, None]
    losses = (wide.logsumexp(1) - wide.gather(1, targets)[:, 0]).where(counted, 0)
    gradient = wide.softmax(1).scatter_add_(1, targets, -torch.ones_like(targets, dtype=wide.dtype))
    logits_NV.copy_(gradient.where(counted[:, None], 0))
    return losses
