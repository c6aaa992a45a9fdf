"""Rotary position embedding (RoPE, arXiv 2104.09864), half-split: dimensions i and i + width/2 are rotated together."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .kernels import kernels_serve, kmem_kernels
from .shape import Shape

# Shape letters: B sequences, T tokens, D width of a head, width number of rotated dimensions.


class Rotation(NamedTuple):
    """Cosines and sines for every position, in fp32; both broadcast over heads."""

    cos: Tensor
    """[B, T, 1, D]: cosines for both halves of the rotated dimensions, 1 for the rest of the head. YaRN scales cosines
    and sines."""
    sin: Tensor
    """[B, T, 1, width/2]."""


def rotation(shape: Shape, position_ids: Tensor) -> Rotation:
    """The rotation for positions [B, T]; all layers of a model share it."""
    if shape.attention.kind == "mla":
        head = width = shape.attention.qk_rope_head_dim
    else:
        head, width = shape.head_dim, round(shape.head_dim * shape.attention.rotary_fraction)
    angles = position_ids[..., None, None].float() * _frequencies(shape, width, position_ids.device)
    cos, sin = angles.cos(), angles.sin()
    magnitude = _magnitude(shape)
    if magnitude != 1:
        cos, sin = cos * magnitude, sin * magnitude
    return Rotation(pad(torch.cat((cos, cos), dim=-1), (0, head - width), value=1.0), sin)


def softmax_factor(shape: Shape) -> float:
    """The factor of latent attention's scores besides the inverse root of their width."""
    yarn = _yarn(shape)
    return 1.0 if yarn is None or yarn.mscale_all_dim is None else _grown(yarn, yarn.mscale_all_dim) ** 2


def _magnitude(shape: Shape) -> float:
    """The factor of cosines and sines."""
    yarn = _yarn(shape)
    if yarn is None:
        return 1.0
    if yarn.mscale is None or yarn.mscale_all_dim is None:
        return _grown(yarn, 1.0)
    return _grown(yarn, yarn.mscale) / _grown(yarn, yarn.mscale_all_dim)


def _grown(yarn: Shape, scale: float) -> float:
    return 0.1 * scale * math.log(yarn.factor) + 1.0


def _yarn(shape: Shape) -> Shape | None:
    scaling = shape.get("rope_scaling")  # models saved before scaling existed lack the field
    return scaling if scaling is not None and scaling.kind == "yarn" else None


def _frequencies(shape: Shape, width: int, device: torch.device) -> Tensor:
    """Radians per position, fp32 [width/2]."""
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
    # The reciprocal is taken last, as in Transformers: a different rounding of frequencies shows at long positions.
    frequencies = 1.0 / shape.rope_theta**exponents
    scaling, yarn = shape.get("rope_scaling"), _yarn(shape)
    if scaling is None:
        return frequencies
    if yarn is not None:
        first, last = (_number_of_frequency(shape, width, turns) for turns in (yarn.beta_fast, yarn.beta_slow))
        low, high = max(math.floor(first), 0), min(math.ceil(last), width - 1)
        kept = 1 - ((torch.arange(width // 2, device=device) - low) / (high - low or 0.001)).clamp(0, 1)
        return 1.0 / (yarn.factor * shape.rope_theta**exponents) * (1 - kept) + frequencies * kept
    turns = scaling.original_max_position_embeddings / (2 * math.pi / frequencies)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


def _number_of_frequency(shape: Shape, width: int, turns: float) -> float:
    """Which frequency turns this often within the sequence length of pretraining, counted from 0; may be in between."""
    length = shape.rope_scaling.original_max_position_embeddings
    return width * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(shape.rope_theta))


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """Rotate the heads of x [B, T, heads, D], in fp32; the result has x's dtype."""
    if kernels_serve(x) and x.dtype != torch.float64:
        cos, sin = (part.expand(*x.shape[:2], 1, -1).flatten(0, 2) for part in by)
        turned = kmem_kernels.rotary.op.rotate(x.flatten(0, 1), cos, sin, backend="triton")
        return turned.unflatten(0, x.shape[:2])
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
