"""The definition of the kernels, in torch; autograd gives the gradients."""

import torch
from torch import Tensor

# Shape letters: N tokens, M branches, D hidden size.

FLOOR = 1e-6
"""Smallest magnitude of a score in the gate: the slope of the square root is infinite at 0."""


def branch_gate(
    hidden_NMD: Tensor, keys_NMD: Tensor, value_ND: Tensor, weight_MD: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """See `op.branch_gate`."""
    wide = torch.promote_types(hidden_NMD.dtype, torch.float32)
    hidden, keys, size = hidden_NMD.to(wide), keys_NMD.to(wide), hidden_NMD.shape[-1]
    scale_h, scale_k = (x.square().mean(-1).add(eps).rsqrt() for x in (hidden, keys))
    score = (hidden * weight_MD * keys).sum(-1) * scale_h * scale_k * size**-0.5
    gate = torch.sigmoid(score.sign() * score.abs().clamp_min(FLOOR).sqrt())
    return (gate[..., None] * value_ND.to(wide)[:, None]).to(value_ND.dtype), gate.detach()
