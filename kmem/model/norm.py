"""Root-mean-square normalisation."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467); statistics in at least fp32. All
    weights are `start` at first."""

    def __init__(self, width: int, eps: float, start: float = 1.0) -> None:
        super().__init__()
        self.eps = eps
        self.initial_values = {"weight": start}
        self.weight = nn.Parameter(torch.full((width,), start))

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu":  # torch has a fused kernel for CUDA devices only
            return _RMSNorm.apply(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"


class _RMSNorm(torch.autograd.Function):
    """On a CPU, takes half the time of F.rms_norm under autograd, and saves one tensor instead of two."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        normed = wide * scale
        ctx.save_for_backward(normed, scale, weight)
        ctx.dtype = x.dtype
        return (normed * weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        # With n = x * scale: dx = scale * (g w - n mean(g w n)).
        normed, scale, weight = ctx.saved_tensors
        products = grad * normed
        means = (products @ weight.to(products.dtype)).unsqueeze(-1).div_(-weight.numel())
        grad_x = (grad * weight).to(normed.dtype).addcmul_(normed, means).mul_(scale)
        return grad_x.to(ctx.dtype), products.flatten(0, -2).sum(0).to(weight.dtype), None
