"""Rotary position embedding (RoPE, arXiv 2104.09864), half-split: dimensions i and i + width/2 are rotated together."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .shape import Shape

# Shape letters: B sequences, T tokens, D width of a head, width number of rotated dimensions.


class Rotation(NamedTuple):
    """Cosines and sines for every position, in fp32; both broadcast over heads."""

    cos: Tensor
    """[B, T, 1, D]: cosines for both halves of the rotated dimensions, 1 for the rest of the head."""
    sin: Tensor
    """[B, T, 1, width/2]."""


def rotation(shape: Shape, position_ids: Tensor) -> Rotation:
    """The rotation for positions [B, T]; all layers of a model share it."""
    if shape.attention.kind == "mla":
        head = width = shape.attention.qk_rope_head_dim
    else:
        head, width = shape.head_dim, round(shape.head_dim * shape.attention.rotary_fraction)
    angles = position_ids[..., None, None].float() * _frequencies(shape, width, position_ids.device)
    cos = angles.cos()
    return Rotation(pad(torch.cat((cos, cos), dim=-1), (0, head - width), value=1.0), angles.sin())


def _frequencies(shape: Shape, width: int, device: torch.device) -> Tensor:
    """Radians per position, fp32 [width/2]."""
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
    # The reciprocal is taken last, as in Transformers: a different rounding of frequencies shows at long positions.
    frequencies = 1.0 / shape.rope_theta**exponents
    scaling = shape.get("rope_scaling")  # models saved before scaling existed lack the field
    if scaling is None:
        return frequencies
    turns = scaling.original_max_position_embeddings / (2 * math.pi / frequencies)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """Rotate the heads of x [B, T, heads, D], in fp32; the result has x's dtype."""
    return _Rotate.apply(x, by.cos, by.sin)


class _Rotate(torch.autograd.Function):
    """Does not save x: the gradient of a rotation is the inverse rotation."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, sin, -1), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    half = sin.shape[-1]
    first, second = slice(half), slice(half, 2 * half)
    out = x * cos
    out[..., first].addcmul_(x[..., second], sin, value=-direction)
    out[..., second].addcmul_(x[..., first], sin, value=direction)
    return out.to(x.dtype)
