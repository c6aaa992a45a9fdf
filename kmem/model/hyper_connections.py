"""Manifold-constrained hyper-connections, mHC (arXiv 2512.24880), on hyper-connections (arXiv 2409.19606).

The residual stream has M branches. A sublayer reads a mixture of them. Its output is added to every branch, with a
weight per branch, and the branches are mixed by a doubly stochastic matrix, which keeps signals from growing with
depth. All three mappings depend on the token. With one branch, this is the plain residual: the stream has no branch
dimension and the connection no parameters.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .kernels import kernels_serve, kmem_kernels

# Shape letters: B sequences, T tokens, M branches, D hidden size.


_MOST_BRANCHES = 8
"""The kernels hold all numbers of a mixing in registers."""


class Mixing(NamedTuple):
    """How a sublayer's output enters the branches, for each token; in at least fp32."""

    post: Tensor
    """[B, T, M], 0..2: weight of the sublayer's output in each branch."""
    residual: Tensor
    """[B, T, M, M], doubly stochastic: row i mixes the old branches into branch i."""


class HyperConnection(nn.Module):
    """The connection around one sublayer.

    Args:
        norm_eps: eps of the RMS that scales the mappings' input, in which the M branches are one vector.
        sinkhorn_iterations: passes over columns and rows, 20 in the paper. Rows sum to 1. Columns sum to 1 within about
            1% where the mixing is uneven and near the identity, since the passes converge slowest there.
        dynamic_scale: initial factor on the token-dependent part of the mappings; small, so that they start nearly
            static.
        residual_logit: initial logit of a branch in its own mixture; the others' are 0. The paper gives no value; 4
            leaves 5% to three other branches, where the logits still have a slope.

    As long as the branches are equal, as `expand_branches` makes them, the initial static mappings (1/M, 1 and nearly
    the identity) act like the plain residual.

    Raises:
        ValueError: `branches` is below 1.
    """

    def __init__(
        self,
        hidden_size: int,
        branches: int,
        *,
        norm_eps: float,
        sinkhorn_iterations: int = 20,
        dynamic_scale: float = 0.01,
        residual_logit: float = 4.0,
    ) -> None:
        super().__init__()
        if branches < 1:
            raise ValueError(f"branches must be at least 1, not {branches}")
        self.branches = branches
        self.norm_eps = norm_eps
        self.sinkhorn_iterations = sinkhorn_iterations
        self.initial_values: dict[str, list[float]] = {}
        """Name -> initial value of the parameters that do not start from random values."""
        if branches == 1:
            return
        pre = [-math.log(branches - 1)] * branches  # a sigmoid of 1 / M
        post = [0.0] * branches
        residual = [residual_logit * (row == column) for row in range(branches) for column in range(branches)]
        self.initial_values = {"bias": pre + post + residual, "scale": [dynamic_scale] * 3}
        width = branches * hidden_size
        self.weight = nn.Parameter(torch.randn(branches * (branches + 2), width) * width**-0.5)
        self.bias = nn.Parameter(torch.tensor(self.initial_values["bias"]))
        self.scale = nn.Parameter(torch.tensor(self.initial_values["scale"]))

    def forward(self, streams: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply `sublayer`, [B, T, D] -> [B, T, D], to the streams [B, T, M, D], or [B, T, D] with one branch."""
        if self.branches == 1:
            return streams + sublayer(streams)
        if self.branches <= _MOST_BRANCHES and kernels_serve(streams) and streams.dtype != torch.float64:
            kernels = kmem_kernels.hyper_connection.op
            taken, flat, mappings = kernels.read(
                streams.flatten(0, 1),
                self.weight,
                self.bias,
                self.scale,
                eps=self.norm_eps,
                iterations=self.sinkhorn_iterations,
                backend="triton",
            )
            output = sublayer(taken.unflatten(0, streams.shape[:2]))
            return kernels.write(flat, output.flatten(0, 1), mappings, backend="triton").view_as(streams)
        taken, mixing = self.read(streams)
        return self.write(streams, sublayer(taken), mixing)

    def read(self, streams: Tensor) -> tuple[Tensor, Mixing]:
        """The sublayer's input [B, T, D], read from streams [B, T, M, D], and the mixing for `write` (eqs. 7 and 8)."""
        branches = self.branches
        wide = torch.promote_types(streams.dtype, torch.float32)
        flat = streams.flatten(2).to(wide)
        # Divide by the norm after the product, as the paper's kernels do: there are fewer values to divide.
        scale = flat.square().mean(-1, keepdim=True).add(self.norm_eps).rsqrt()
        dynamic = nn.functional.linear(flat, self.weight.to(wide)) * scale
        parts = [branches, branches, branches * branches]
        pre, post, residual = (
            part * factor + bias
            for part, factor, bias in zip(
                dynamic.split(parts, dim=-1), self.scale.to(wide), self.bias.to(wide).split(parts), strict=True
            )
        )
        mixing = Mixing(
            2 * torch.sigmoid(post),
            doubly_stochastic(residual.unflatten(-1, (branches, branches)), self.sinkhorn_iterations),
        )
        taken = (torch.sigmoid(pre)[..., None] * streams).sum(-2)
        return taken.to(streams.dtype), mixing

    def write(self, streams: Tensor, output: Tensor, mixing: Mixing) -> Tensor:
        """The next streams [B, T, M, D]: the mixed old streams plus the sublayer's output [B, T, D] (eq. 3)."""
        mixed = mixing.residual @ streams.to(mixing.residual.dtype)
        return torch.addcmul(mixed, mixing.post[..., None], output.to(mixed.dtype)[..., None, :]).to(streams.dtype)


def expand_branches(hidden: Tensor, branches: int) -> Tensor:
    """The first layer's streams [B, T, M, D]: hidden [B, T, D] copied to every branch. With one branch, hidden
    itself."""
    return hidden if branches == 1 else hidden[:, :, None].expand(-1, -1, branches, -1).contiguous()


def collapse_branches(streams: Tensor, branches: int) -> Tensor:
    """The mean of the branches, [B, T, D], which the final norm reads. The hyper-connections paper takes the sum; the
    norm makes no difference between the two."""
    return streams if branches == 1 else streams.mean(-2)


def doubly_stochastic(logits: Tensor, iterations: int) -> Tensor:
    """Sinkhorn-Knopp on exp(logits) [.., M, M]: scale columns, then rows, to sum to 1, `iterations` times (eq. 9).

    Computed in at least fp32 and in logarithms, so that no logits over- or underflow. The backward pass saves only the
    logits and repeats the passes.
    """
    return _Sinkhorn.apply(logits, iterations)


class _Sinkhorn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, iterations: int) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.iterations = iterations
        logs = logits.to(torch.promote_types(logits.dtype, torch.float32))
        for _ in range(iterations):
            for dim in (-2, -1):
                logs = logs.log_softmax(dim)
        return logs.exp()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (logits,) = ctx.saved_tensors
        logs = logits.to(torch.promote_types(logits.dtype, torch.float32))
        passes = []
        for _ in range(ctx.iterations):
            for dim in (-2, -1):
                logs = logs.log_softmax(dim)
                passes.append((dim, logs.exp()))
        grad = grad * logs.exp()
        for dim, shares in reversed(passes):
            grad = grad - shares * grad.sum(dim, keepdim=True)
        return grad.to(logits.dtype), None
