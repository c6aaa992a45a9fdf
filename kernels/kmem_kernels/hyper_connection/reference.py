"""The definition of the kernels, in torch; autograd gives the gradients."""

import torch
import torch.nn.functional as F
from torch import Tensor

# Shape letters: N tokens, M branches, D hidden size.


def read(
    streams_NMD: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, eps: float, iterations: int
) -> tuple[Tensor, Tensor]:
    """The sublayer's input [N, D] and the mappings [N, M + 2, M], see `op.read`."""
    branches = streams_NMD.shape[1]
    wide = torch.promote_types(streams_NMD.dtype, torch.float32)
    streams, flat = streams_NMD.to(wide), streams_NMD.flatten(1).to(wide)
    rms = flat.square().mean(-1, keepdim=True).add(eps).rsqrt()
    dynamic = F.linear(flat, weight.to(wide)) * rms
    factors = torch.cat((scale[:2], scale[2:].expand(branches))).to(wide)
    logits = dynamic.unflatten(1, (branches + 2, branches)) * factors[:, None] + bias.to(wide).view(-1, branches)
    pre, post, logs = torch.sigmoid(logits[:, 0]), 2 * torch.sigmoid(logits[:, 1]), logits[:, 2:]
    for _ in range(iterations):
        for dim in (1, 2):
            logs = logs.log_softmax(dim)
    taken = (pre[..., None] * streams).sum(1)
    return taken.to(streams_NMD.dtype), torch.cat((pre[:, None], post[:, None], logs.exp()), dim=1)


def write(streams_NMD: Tensor, output_ND: Tensor, mappings: Tensor) -> Tensor:
    """The next streams [N, M, D], see `op.write`."""
    mixed = mappings[:, 2:] @ streams_NMD.to(mappings.dtype)
    return torch.addcmul(mixed, mappings[:, 1, :, None], output_ND.to(mappings.dtype)[:, None]).to(streams_NMD.dtype)
