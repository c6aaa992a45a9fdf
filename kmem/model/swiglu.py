"""silu(gate) * up (SwiGLU, arXiv 2002.05202)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kernels import kernels_serve, kmem_kernels

# Shape letters: N rows, I width.


def swiglu(gate_up: Tensor) -> Tensor:
    """gate_up [N, 2I], the gate's columns first -> silu(gate) * up [N, I]. Saves only gate_up for the backward pass."""
    if kernels_serve(gate_up):
        return kmem_kernels.swiglu.op.swiglu(gate_up, backend="triton")
    return _SwiGLU.apply(gate_up)


def silu_times(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, all [.., I]."""
    if kernels_serve(gate):
        return kmem_kernels.swiglu.op.silu_times(gate.flatten(0, -2), up.flatten(0, -2), backend="triton").view_as(gate)
    return F.silu(gate) * up


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        out = torch.empty_like(gate_up)
        grad_gate, grad_up = out.chunk(2, dim=-1)
        # In place: fresh memory for the intermediate values would cost more than the arithmetic.
        torch.ops.aten.silu.out(gate, out=grad_up).mul_(grad)
        torch.mul(grad, up, out=grad_gate)
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        return out
