"""Reading and writing the branches of hyper-connections (mHC, arXiv 2512.24880, eqs. 3, 7, 8 and 9), with gradients.

Deterministic, without atomics. Statistics, mappings and sums are fp32. The backward pass saves the streams, the
sublayer's output and 2 M (M + 2) + 1 numbers per token.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backend import Backend, chosen
from . import reference

# Shape letters: N tokens, M branches, D hidden size.


class Read(NamedTuple):
    """What a sublayer reads, and what `write` needs."""

    taken: Tensor
    """[N, D], in the streams' dtype: the sublayer's input."""
    streams: Tensor
    """[N, M, D]: the streams themselves. Given to `write`, their two gradients are added in one pass."""
    mappings: Tensor
    """[N, M + 2, M], fp32: how the branches are read (row 0, 0..1), written to (row 1, 0..2) and mixed (doubly
    stochastic; the row of each new branch)."""


def read(
    streams_NMD: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor,
    *,
    eps: float,
    iterations: int,
    backend: Backend | None = None,
) -> Read:
    """Compute the mappings of every token, and read the sublayer's input.

    Args:
        streams_NMD: bf16, fp16 or fp32; contiguous.
        weight: [M (M + 2), M D], of the token-dependent part; the rows are those of the mappings.
        bias: [M (M + 2)]
        scale: [3], factors of the token-dependent part in row 0, row 1 and the other rows.
        eps: of the RMS of a token's M D values.
        iterations: of Sinkhorn-Knopp.
        backend: default `triton` for CUDA tensors, else `torch`.

    Raises:
        ValueError: the shapes do not fit together.
        TypeError: the Triton backend was given fp64.
    """
    _, branches, hidden = streams_NMD.shape
    numbers = branches * (branches + 2)
    found = (tuple(weight.shape), tuple(bias.shape), tuple(scale.shape))
    if found != ((numbers, branches * hidden), (numbers,), (3,)):
        raise ValueError(f"weight, bias and scale are {found}, which does not fit streams {tuple(streams_NMD.shape)}")
    if chosen(backend, streams_NMD) == "torch":
        taken, mappings = reference.read(streams_NMD, weight, bias, scale, eps, iterations)
        return Read(taken, streams_NMD, mappings)
    if streams_NMD.dtype.itemsize > 4:
        raise TypeError("the Triton backend computes in fp32, but was given fp64")
    return Read(*_Read.apply(streams_NMD.contiguous(), weight, bias, scale, eps, iterations))


def write(streams_NMD: Tensor, output_ND: Tensor, mappings: Tensor, backend: Backend | None = None) -> Tensor:
    """The next streams [N, M, D]: the mixed old streams plus the sublayer's output, in the streams' dtype.

    Args:
        streams_NMD, mappings: as `read` returns them.
        output_ND: in the streams' dtype.
        backend: default `triton` for CUDA tensors, else `torch`.

    Raises:
        ValueError: the shapes do not fit together.
    """
    tokens, branches, hidden = streams_NMD.shape
    if output_ND.shape != (tokens, hidden) or mappings.shape != (tokens, branches + 2, branches):
        raise ValueError(
            f"output {tuple(output_ND.shape)} and mappings {tuple(mappings.shape)} do not fit streams "
            f"{tuple(streams_NMD.shape)}"
        )
    if chosen(backend, streams_NMD) == "torch":
        return reference.write(streams_NMD, output_ND, mappings)
    return _Write.apply(streams_NMD.contiguous(), output_ND.contiguous(), mappings.contiguous())


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, streams: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, eps: float, iterations: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        from .triton import hyper_connection_read as kernel

        taken, mappings, dynamic, rms = kernel(streams, weight, bias, scale, eps, iterations)
        ctx.save_for_backward(streams, weight, bias, scale, mappings, dynamic, rms)
        ctx.iterations = iterations
        return taken, streams, mappings

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_taken: Tensor, grad_streams: Tensor, grad_mappings: Tensor) -> tuple[Any, ...]:
        from .triton import hyper_connection_read_backward as kernel

        grads = (grad.contiguous() for grad in (grad_taken, grad_streams, grad_mappings))
        return *kernel(*grads, *ctx.saved_tensors, ctx.iterations), None, None


class _Write(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, streams: Tensor, output: Tensor, mappings: Tensor) -> Tensor:
        from .triton import hyper_connection_write as kernel

        ctx.save_for_backward(streams, output, mappings)
        return kernel(streams, output, mappings)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        from .triton import hyper_connection_write_backward as kernel

        return kernel(grad.contiguous(), *ctx.saved_tensors)
