"""x + silu(convolution(norm(x))): the values of earlier tokens in an engram layer (arXiv 2601.07372, section 2.3), with
gradients.

Deterministic, without atomics; computed in fp32 and rounded once. The backward pass saves the inputs and one number per
token and branch.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backend import Backend, chosen
from . import reference

# Shape letters: B sequences, T tokens, M branches, D hidden size, K taps.


def convolved(
    x_BTMD: Tensor,
    norm_MD: Tensor,
    taps: Tensor,
    *,
    eps: float,
    dilation: int,
    document_ids: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """x plus the activated depthwise causal convolution of its RMSNorm over D.

    Args:
        x_BTMD: any float dtype.
        norm_MD: fp32, the norm's factors.
        taps: [M * D, K]; the last tap multiplies the token itself, the one before it the token `dilation` earlier.
        document_ids: int64 [B, T]; if given, taps stay within documents.
        backend: default `triton` for CUDA tensors, else `torch`.

    Raises:
        ValueError: the shapes do not fit together.
        TypeError: the Triton backend was given fp64.
    """
    branches, hidden = x_BTMD.shape[2:]
    if norm_MD.shape != (branches, hidden) or taps.shape[0] != branches * hidden:
        raise ValueError(f"norm {tuple(norm_MD.shape)} and taps {tuple(taps.shape)} do not fit {tuple(x_BTMD.shape)}")
    if chosen(backend, x_BTMD) == "torch":
        return reference.convolved(x_BTMD, norm_MD, taps, eps, dilation, document_ids)
    if x_BTMD.dtype == torch.float64:
        raise TypeError("the Triton backend computes in fp32, but was given fp64")
    documents = None if document_ids is None else document_ids.flatten().contiguous()
    by_tap = taps.float().flip(1).T.contiguous().view(-1, branches, hidden)
    flat = x_BTMD.flatten(0, 1).contiguous()
    return _Convolved.apply(
        flat, norm_MD.float().contiguous(), by_tap, documents, eps, dilation, x_BTMD.shape[1]
    ).view_as(x_BTMD)


class _Convolved(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm: Tensor,
        taps: Tensor,
        documents: Tensor | None,
        eps: float,
        dilation: int,
        length: int,
    ) -> Tensor:
        from .triton import engram_convolved as kernel

        out, scales = kernel(x, norm, taps, documents, eps, dilation, length)
        ctx.save_for_backward(x, scales, norm, taps, documents)
        ctx.sizes = dilation, length
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        from .triton import engram_convolved_backward as kernel

        return *kernel(grad.contiguous(), *ctx.saved_tensors, *ctx.sizes), None, None, None, None
