"""Operators of meta tensors for what is one kernel of PyTorch on a GPU: attention, grouped products, RMSNorm. They have
shapes, and compute nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_library = torch.library.Library("kmem_meta", "DEF")
_library.define("attention(Tensor query, Tensor key, Tensor value) -> (Tensor, Tensor)")
_library.define(
    "attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor logsumexp)"
    " -> (Tensor, Tensor, Tensor)"
)
_library.define("grouped_mm(Tensor rows, Tensor weights, Tensor ends) -> Tensor")
_library.define("grouped_mm_backward(Tensor grad, Tensor rows, Tensor weights, Tensor ends) -> (Tensor, Tensor)")
_library.define("rms_norm(Tensor x, Tensor weight) -> (Tensor, Tensor)")
_library.define("rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor scale) -> (Tensor, Tensor)")


def _attention(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, _ = query.shape
    out = query.new_empty(batch, tokens, heads, value.shape[-1]).transpose(1, 2)
    return out, query.new_empty(batch, heads, tokens, dtype=torch.float32)


_library.impl("attention", _attention, "Meta")
_library.impl(
    "attention_backward", lambda grad, *inputs: tuple(torch.empty_like(tensor) for tensor in inputs[:3]), "Meta"
)
_library.impl("grouped_mm", lambda rows, weights, ends: rows.new_empty(len(rows), weights.shape[2]), "Meta")
_library.impl(
    "grouped_mm_backward",
    lambda grad, rows, weights, ends: (torch.empty_like(rows), torch.empty_like(weights)),
    "Meta",
)
_library.impl(
    "rms_norm",
    lambda x, weight: (torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)),
    "Meta",
)
_library.impl(
    "rms_norm_backward",
    lambda grad, x, weight, scale: (torch.empty_like(x), torch.empty_like(weight)),
    "Meta",
)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out, logsumexp = torch.ops.kmem_meta.attention(query, key, value)
        ctx.save_for_backward(query, key, value, out, logsumexp)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return torch.ops.kmem_meta.attention_backward(grad, *ctx.saved_tensors)


class _GroupedProduct(torch.autograd.Function):
    """Of any dtype, and with counts of more groups than a rank holds."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights, ends)
        return torch.ops.kmem_meta.grouped_mm(rows, weights, ends)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return *torch.ops.kmem_meta.grouped_mm_backward(grad, *ctx.saved_tensors), None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        out, scale = torch.ops.kmem_meta.rms_norm(x, weight)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return torch.ops.kmem_meta.rms_norm_backward(grad, *ctx.saved_tensors)


@contextmanager
def fused_as_on_gpus() -> Iterator[None]:
    """What is one kernel of PyTorch on a GPU becomes one operator on meta tensors, where PyTorch takes it apart. (A
    mode for functions would not see what the backward pass computes again.)"""
    replaced: dict[str, Callable[..., Any]] = {
        "scaled_dot_product_attention": lambda query, key, value, **_: _Attention.apply(query, key, value),
        "grouped_mm": lambda rows, weights, offs: _GroupedProduct.apply(rows, weights, offs),
        "rms_norm": lambda x, shape, weight, eps: _RMSNorm.apply(x, weight),
    }
    known = {name: getattr(F, name) for name in replaced}
    try:
        for name, function in replaced.items():
            setattr(F, name, function)
        yield
    finally:
        for name, function in known.items():
            setattr(F, name, function)
