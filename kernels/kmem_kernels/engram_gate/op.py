"""The gate of an engram layer (arXiv 2601.07372, section 2.3), with gradients in closed form.

Deterministic, without atomics; statistics are fp32. The backward pass saves the inputs and four numbers per token and
branch.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backend import Backend, chosen
from . import reference

# Shape letters: N tokens, M branches, D hidden size.


def branch_gate(
    hidden_NMD: Tensor,
    keys_NMD: Tensor,
    value_ND: Tensor,
    weight_MD: Tensor,
    eps: float,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """sigmoid(signed square root of <norm(hidden), norm(keys)> / sqrt(D)) * value, [N, M, D] in the value's dtype, and
    the gate itself, [N, M] in fp32, without a gradient.

    Args:
        hidden_NMD, keys_NMD, value_ND: of one float dtype. If |score| < FLOOR, no gradient passes through the gate.
        weight_MD: fp32, the product of the two norms' factors.
        eps: of the norms.
        backend: default `triton` for CUDA tensors, else `torch`.

    Raises:
        ValueError: the shapes do not fit together.
        TypeError: the Triton backend was given fp64.
    """
    tokens, branches, hidden = hidden_NMD.shape
    found = (tuple(keys_NMD.shape), tuple(value_ND.shape), tuple(weight_MD.shape))
    if found != ((tokens, branches, hidden), (tokens, hidden), (branches, hidden)):
        raise ValueError(f"keys, value and weight are {found}, which does not fit hidden {tuple(hidden_NMD.shape)}")
    if chosen(backend, hidden_NMD) == "torch":
        return reference.branch_gate(hidden_NMD, keys_NMD, value_ND, weight_MD, eps)
    if hidden_NMD.dtype == torch.float64:
        raise TypeError("the Triton backend computes in fp32, but was given fp64")
    tensors = (x.contiguous() for x in (hidden_NMD, keys_NMD, value_ND, weight_MD.float()))
    return _BranchGate.apply(*tensors, eps)


class _BranchGate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, keys: Tensor, value: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        from .triton import engram_gate as kernel

        out, numbers = kernel(hidden, keys, value, weight, eps)
        gate = numbers[:, 3]
        ctx.save_for_backward(hidden, keys, value, weight, numbers)
        ctx.mark_non_differentiable(gate)
        return out, gate

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
        from .triton import engram_gate_backward as kernel

        return *kernel(grad.contiguous(), *ctx.saved_tensors), None
