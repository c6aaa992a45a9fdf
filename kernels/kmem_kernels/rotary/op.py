"""Rotary position embedding (RoPE, arXiv 2104.09864), half-split, with gradients. Computed in fp32, rounded once; the
backward pass saves no input."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backend import Backend, chosen
from . import reference

# Shape letters: N tokens, h heads, D width of a head.


def rotate(x_NhD: Tensor, cos_ND: Tensor, sin: Tensor, backend: Backend | None = None) -> Tensor:
    """Rotate values i and i + n of every head together, for i below n; [N, h, D] in x's dtype.

    Args:
        cos_ND: fp32, the cosines for both values; whatever else is at places from 2n on is a factor.
        sin: fp32 [N, n], with 2n at most D.
        backend: default `triton` for CUDA tensors, else `torch`.

    Raises:
        ValueError: the shapes do not fit together.
        TypeError: the Triton backend was given fp64.
    """
    tokens, _, width = x_NhD.shape
    if cos_ND.shape != (tokens, width) or len(sin) != tokens or 2 * sin.shape[1] > width:
        raise ValueError(
            f"cosines {tuple(cos_ND.shape)} and sines {tuple(sin.shape)} do not fit heads {tuple(x_NhD.shape)}"
        )
    if chosen(backend, x_NhD) == "torch":
        return reference.rotated(x_NhD, cos_ND, sin, 1)
    if x_NhD.dtype == torch.float64:
        raise TypeError("the Triton backend computes in fp32, but was given fp64")
    return _Rotate.apply(x_NhD, cos_ND.contiguous(), sin.contiguous())


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        from .triton import rotary as kernel

        ctx.save_for_backward(cos, sin)
        return kernel(x if x.stride(2) == 1 else x.contiguous(), cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        from .triton import rotary as kernel

        return kernel(grad if grad.stride(2) == 1 else grad.contiguous(), *ctx.saved_tensors, -1), None, None
