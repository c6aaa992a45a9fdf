"""silu(gate) * up (SwiGLU, arXiv 2002.05202) with gradients. Forward and backward are one pass over memory each, and
round once.

The backward pass recomputes the activation, so only gate and up are saved.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backend import Backend, chosen
from . import reference

# Shape letters: N rows, I width.


def swiglu(gate_up: Tensor, backend: Backend | None = None) -> Tensor:
    """`silu_times` of the two halves of gate_up [N, 2I], the gate's columns first; [N, I].

    Raises:
        ValueError: the number of columns is odd.
    """
    if gate_up.shape[1] % 2:
        raise ValueError(f"{gate_up.shape[1]} columns cannot be split into gate and up of equal width")
    if chosen(backend, gate_up) == "torch":
        return reference.silu_times(*gate_up.chunk(2, dim=1))
    return _SwiGLU.apply(gate_up)


def silu_times(gate_NI: Tensor, up_NI: Tensor, backend: Backend | None = None) -> Tensor:
    """silu(gate) * up, [N, I] in their dtype; computed in fp32 (fp64 for fp64).

    Args:
        gate_NI, up_NI: tensors of the same float dtype.
        backend: default `triton` for CUDA tensors, else `torch`.

    Raises:
        ValueError: shapes or dtypes differ.
    """
    if gate_NI.shape != up_NI.shape or gate_NI.dtype != up_NI.dtype:
        raise ValueError(
            f"gate is {gate_NI.dtype} {tuple(gate_NI.shape)} and up {up_NI.dtype} {tuple(up_NI.shape)}: they must agree"
        )
    if chosen(backend, gate_NI) == "torch":
        return reference.silu_times(gate_NI, up_NI)
    return _SiluTimes.apply(gate_NI, up_NI)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        from .triton import silu_times as kernel

        ctx.save_for_backward(gate_up)
        return kernel(*gate_up.chunk(2, dim=1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NI: Tensor) -> Tensor:
        from .triton import swiglu_backward as kernel

        return kernel(grad_NI, *ctx.saved_tensors)


class _SiluTimes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_NI: Tensor, up_NI: Tensor) -> Tensor:
        from .triton import silu_times as kernel

        ctx.save_for_backward(gate_NI, up_NI)
        return kernel(gate_NI, up_NI)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NI: Tensor) -> tuple[Tensor, Tensor]:
        from .triton import silu_times_backward as kernel

        return kernel(grad_NI, *ctx.saved_tensors)
