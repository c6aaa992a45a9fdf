"""Matrix products. On the CPU they use the faster of the two libraries that PyTorch ships.

torch.mm in fp32 calls MKL, which uses only AVX2 on AMD processors. oneDNN, in the same PyTorch, uses AVX-512 there: 400
against 190 GFLOP/s on two cores of a Zen 5 EPYC. Everywhere else, these functions call torch's own.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Shape letters: N rows, K input width, M output width, E groups.

MOST_GROUPS = 1023
"""Largest number of groups in one product: grouped_mm on CUDA has one thread per group, in one block."""
ROW_STEP = 32
"""oneDNN compiles a kernel for every new number of rows, which takes about as long as a GEMM. Groups of tokens are
rounded up to a multiple of this many rows, so that few numbers occur."""


class OneDNNLinear(nn.Linear):
    """nn.Linear through `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [.., K], weight [M, K], bias [M] -> x @ weight.T + bias [.., M]."""
    return _OneDNNLinear.apply(x, weight, bias) if _onednn_serves(x, weight) else F.linear(x, weight, bias)


def times_transposed(a: Tensor, b: Tensor) -> Tensor:
    """a [N, K], b [M, K] -> a @ b.T [N, M], outside autograd. Both may be transposed views."""
    return _onednn(a, b) if _onednn_serves(a, b) else a @ b.T


def grouped_linear(rows: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
    """rows [N, K] in groups of `counts` [E] rows, weights [E, M, K] -> each group @ its weight.T, [N, M].

    The counts must cover every row: past the last group, grouped_mm returns uninitialised memory.
    """
    ends = counts.cumsum(0)
    if torch.compiler.is_compiling() and rows.dtype == torch.float32:
        return _compiled_grouped_linear(rows, weights, ends)
    assert rows.device.type != "cpu" or int(ends[-1]) == len(rows), f"{int(ends[-1])} rows counted, {len(rows)} given"
    if rounds_groups(rows, weights):
        return _OneDNNGroupedLinear.apply(rows, weights, ends)
    if rows.dtype == torch.float64:  # grouped_mm does not support it
        parts = zip(rows.split(counts.tolist()), weights.unbind(), strict=True)
        return torch.cat([F.linear(part, weight) for part, weight in parts])
    if len(counts) <= MOST_GROUPS:
        return F.grouped_mm(rows, weights.transpose(1, 2), offs=ends.to(torch.int32))
    last = ends[MOST_GROUPS - 1 : -1 : MOST_GROUPS].tolist()  # synchronises if the counts are on a device
    sizes = [stop - start for start, stop in pairwise([0, *last, len(rows)])]
    cut = zip(rows.split(sizes), weights.split(MOST_GROUPS), counts.split(MOST_GROUPS), strict=True)
    return torch.cat([grouped_linear(*operands) for operands in cut])


_LIBRARY = __name__.replace(".", "_")  # exported code is a module of its own, beside kmem's


@torch.library.custom_op(f"{_LIBRARY}::grouped_linear", mutates_args=())
def _compiled_grouped_linear(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """`grouped_linear` in compiled code: torch's compiler refuses grouped_mm in fp32 (2.13)."""
    return F.grouped_mm(rows, weights.transpose(1, 2), offs=ends.to(torch.int32))


@torch.library.custom_op(f"{_LIBRARY}::grouped_outer", mutates_args=())
def _compiled_grouped_outer(grad: Tensor, rows: Tensor, ends: Tensor) -> Tensor:
    """grad [N, M], rows [N, K] -> each group's grad.T @ rows, [E, M, K]."""
    return F.grouped_mm(grad.T, rows, offs=ends.to(torch.int32))


@_compiled_grouped_linear.register_fake
def _(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weights.shape[1])


@_compiled_grouped_outer.register_fake
def _(grad: Tensor, rows: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(ends.shape[0], grad.shape[1], rows.shape[1])


def _compiled_backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    rows, weights, ends = ctx.saved_tensors
    grad = grad.contiguous()
    return (
        _compiled_grouped_linear(grad, weights.transpose(1, 2).contiguous(), ends),
        _compiled_grouped_outer(grad, rows, ends),
        None,
    )


_compiled_grouped_linear.register_autograd(
    _compiled_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)


def rounds_groups(rows: Tensor, weights: Tensor) -> bool:
    """Whether oneDNN multiplies groups of these rows [N, K] by these weights [E, M, K], in windows of
    `rounded_groups`."""
    return _onednn_serves(rows, weights) or _groups_need_rounding(rows, weights)


class Group(NamedTuple):
    """Rows [start, end) of a group, and a window around them."""

    number: int
    start: int
    end: int
    window: slice
    """The rows of the group and neighbouring rows."""
    own: slice
    """The group's rows, counted within the window."""


def rounded_groups(ends: Tensor, rows: int) -> Iterator[Group]:
    """The non-empty groups, given the ends [E] of all groups; a window has a multiple of ROW_STEP rows, or all
    `rows`."""
    start = 0
    for number, end in enumerate(ends.tolist()):
        if start < end:
            size = min(-(-(end - start) // ROW_STEP) * ROW_STEP, rows)
            first = min(start, rows - size)
            yield Group(number, start, end, slice(first, first + size), slice(start - first, end - first))
        start = end


_CPU = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
_ONEDNN = torch.backends.mkldnn.is_available() and bool(_CPU.get("avx512_f"))
_USE_ONEDNN = _ONEDNN and str(_CPU.get("cpu_name", "")).startswith("AMD") and torch.backends.mkl.is_available()
BF16_IS_ONEDNN = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
"""Whether oneDNN multiplies bf16 matrices on this CPU. It needs AVX-512; without it, bf16 is about nine times as slow
as fp32."""
Linear = OneDNNLinear if _USE_ONEDNN and not torch.cuda.is_available() else nn.Linear
"""The class of linear layers. Plain where nothing is gained: quantizers such as bitsandbytes replace no subclass."""
HAS_AMX = bool(_CPU.get("amx_bf16"))
"""Whether this CPU has matrix units for bf16."""


def _onednn_serves(x: Tensor, weight: Tensor) -> bool:
    return (
        _USE_ONEDNN
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() >= ROW_STEP * x.shape[-1]  # with fewer rows, oneDNN's fixed cost dominates
        and not torch.is_autocast_enabled("cpu")
    )


def _groups_need_rounding(x: Tensor, weight: Tensor) -> bool:
    """In bf16, PyTorch calls oneDNN for every product, if oneDNN can: without rounding, it would compile a kernel per
    group size."""
    return (
        BF16_IS_ONEDNN
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.bfloat16
        and len(x) >= ROW_STEP
        and not torch.is_autocast_enabled("cpu")
    )


def _onednn(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


class _OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            _onednn(grad, weight.T) if needs_x else None,
            _onednn(grad.flatten(0, -2).T, x.flatten(0, -2).T) if needs_weight else None,
            grad.flatten(0, -2).sum(0) if needs_bias else None,
        )


class _OneDNNGroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights, ends)
        return _grouped_onednn(rows, weights, ends)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weights, ends = ctx.saved_tensors
        needs_rows, needs_weights, _ = ctx.needs_input_grad
        return (
            _grouped_onednn(grad, weights.transpose(1, 2), ends) if needs_rows else None,
            _grouped_weight_gradient(grad, rows, weights, ends) if needs_weights else None,
            None,
        )


def _grouped_onednn(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    out = rows.new_empty(len(rows), weights.shape[1])
    for group in rounded_groups(ends, len(rows)):
        # The results of the neighbouring rows are dropped.
        out[group.start : group.end] = _onednn(rows[group.window], weights[group.number])[group.own]
    return out


def _grouped_weight_gradient(grad: Tensor, rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Each group's grad.T @ rows, [E, M, K]; zeros for a group without rows."""
    out = torch.zeros_like(weights)
    for group in rounded_groups(ends, len(rows)):
        # The neighbouring rows are multiplied by zeros of the other factor.
        padded = grad.new_zeros(group.window.stop - group.window.start, grad.shape[1])
        padded[group.own] = grad[group.start : group.end]
        out[group.number] = _onednn(padded.T, rows[group.window].T)
    return out
