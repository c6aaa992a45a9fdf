"""The definition of the kernels, in torch; autograd gives the gradients."""

import torch
import torch.nn.functional as F
from torch import Tensor

# Shape letters: N rows, I width.


def silu_times(gate_NI: Tensor, up_NI: Tensor) -> Tensor:
    """See `op.silu_times`."""
    wide = torch.promote_types(gate_NI.dtype, torch.float32)
    return (F.silu(gate_NI.to(wide)) * up_NI.to(wide)).to(gate_NI.dtype)
