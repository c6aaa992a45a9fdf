"""The definition of the kernels, in torch; autograd gives the gradients."""

import torch
import torch.nn.functional as F
from torch import Tensor

# Shape letters: B sequences, T tokens, M branches, D hidden size, K taps.


def convolved(
    x_BTMD: Tensor, norm_MD: Tensor, taps: Tensor, eps: float, dilation: int, document_ids: Tensor | None
) -> Tensor:
    """See `op.convolved`."""
    x = x_BTMD.to(torch.promote_types(x_BTMD.dtype, torch.float32))
    normed = x * x.square().mean(-1, keepdim=True).add(eps).rsqrt() * norm_MD
    kernel, tokens = taps.shape[1], x.shape[1]
    out = torch.zeros_like(x)
    for tap in range(kernel):
        back = tap * dilation
        if back >= tokens:
            break
        past = normed[:, : tokens - back]
        if document_ids is not None:
            same = document_ids[:, back:] == document_ids[:, : tokens - back]
            past = past * same[..., None, None]
        out[:, back:] += past * taps[:, -1 - tap].to(x.dtype).view_as(norm_MD)
    return (x + F.silu(out)).to(x_BTMD.dtype)
