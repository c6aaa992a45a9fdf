"""Initial values. They depend on the seed and the canonical name alone, never on how a model is sharded."""

import hashlib
import math

import torch
from torch import Tensor, nn

from .experts import Experts
from .shape import Shape

RESIDUAL_WRITERS = ("o_proj", "down_proj")
"""Matrices that write into the residual stream."""
TRUNCATION = 3.0
"""The normal is truncated at this many standard deviations."""


def initialise_(module: nn.Module, shape: Shape, seed: int, prefix: str = "") -> None:
    """Fill every parameter and persistent buffer of `module`; a canonical name is `prefix` + the local name.

    A module sets tensors in `initial_values` (numbers that broadcast to the tensor), as norms do. Other vectors, such
    as biases, are zero. A module can name the distribution of a tensor below it in `initial_draws`: ("normal", standard
    deviation; truncated) or ("uniform", bound). All other matrices are drawn from a truncated normal with standard
    deviation `init_std`. With `depth_scaled_init`, the matrices that write into the residual stream use `init_std` /
    sqrt(2 * num_layers) (GPT-2's rule). Every matrix, and every expert of a stack, has its own generator, on the CPU
    and in fp32, so each rank draws only what it holds.
    """
    with torch.no_grad():
        draws = {
            _joined(prefix, path, name): draw
            for path, owner in module.named_modules()
            for name, draw in getattr(owner, "initial_draws", {}).items()
        }
        for path, owner in module.named_modules():
            for name, tensor in (*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)):
                full_name = _joined(prefix, path, name)
                _initialise_tensor(tensor, full_name, owner, shape, seed, draws.get(full_name))


def _joined(*parts: str) -> str:
    return ".".join(part.rstrip(".") for part in parts if part)


def _initialise_tensor(
    tensor: Tensor, name: str, owner: nn.Module, shape: Shape, seed: int, draw: tuple[str, float] | None = None
) -> None:
    constants, local_name = getattr(owner, "initial_values", {}), name.rpartition(".")[2]
    if local_name in constants:
        tensor.copy_(torch.tensor(constants[local_name]))
        return
    if draw is not None:
        form, size = draw
        if form == "uniform":
            tensor.copy_(torch.empty(tensor.shape).uniform_(-size, size, generator=generator_of(seed, name)))
        else:
            tensor.copy_(truncated_normal(tensor.shape, size, seed, name))
        return
    if tensor.dim() == 1:
        tensor.zero_()
        return
    std = shape.init_std
    if shape.depth_scaled_init and any(part in RESIDUAL_WRITERS for part in name.split(".")):
        std /= math.sqrt(2 * shape.num_layers)
    if isinstance(owner, Experts):
        for expert, matrix in zip(owner.local_experts, tensor, strict=True):
            matrix.copy_(truncated_normal(matrix.shape, std, seed, f"{name}.{expert}"))
    else:
        tensor.copy_(truncated_normal(tensor.shape, std, seed, name))


def truncated_normal(size: torch.Size, std: float, seed: int, name: str) -> Tensor:
    """Initial values fp32 for the tensor of this name: a normal with standard deviation `std`, then truncated."""
    bound = TRUNCATION * std
    return nn.init.trunc_normal_(torch.empty(size), std=std, a=-bound, b=bound, generator=generator_of(seed, name))


def generator_of(seed: int, name: str) -> torch.Generator:
    """The generator, on the CPU, for the tensor of this name."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
