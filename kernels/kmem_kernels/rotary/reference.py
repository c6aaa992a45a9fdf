"""The definition of the kernel, in torch."""

import torch
from torch import Tensor

# Shape letters: N tokens, h heads, D width of a head.


def rotated(x_NhD: Tensor, cos_ND: Tensor, sin: Tensor, direction: int) -> Tensor:
    """See `op.rotate`. `direction`: -1 for the inverse."""
    half = sin.shape[1]
    x = x_NhD.to(torch.promote_types(x_NhD.dtype, torch.float32))
    first, second, rest = x.split((half, half, x.shape[2] - 2 * half), dim=2)
    turned = torch.cat((-second, first), dim=2) * torch.cat((sin, sin), dim=1)[:, None] * direction
    return (x * cos_ND[:, None] + torch.cat((turned, torch.zeros_like(rest)), dim=2)).to(x_NhD.dtype)
