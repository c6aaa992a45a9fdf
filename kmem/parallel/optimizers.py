"""The optimizer of everything but tables: by its name in a configuration, over groups of parameters."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kmem.config import OptimizerConfig
from kmem.parallel.mesh import Mesh


@dataclass(frozen=True)
class BackboneOptimizer:
    """An optimizer of the backbone.

    Args:
        make: (parameter groups, settings) -> the optimizer.
        moments: names of its state for every parameter besides `step`: fp32 tensors of the parameter's shape.
    """

    make: Callable[[list[dict[str, Any]], OptimizerConfig], torch.optim.Optimizer]
    moments: tuple[str, ...]


def _adamw(groups: list[dict[str, Any]], settings: OptimizerConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)


_ALIGNED = 8
"""bf16 values in 16 bytes."""
BACKBONE_OPTIMIZERS = {"adamw": BackboneOptimizer(_adamw, ("exp_avg", "exp_avg_sq"))}


def make_backbone_optimizer(
    named: Sequence[tuple[str, nn.Parameter]], settings: OptimizerConfig, mesh: Mesh
) -> torch.optim.Optimizer:
    """The optimizer that the settings name, for parameters given with their canonical names."""
    return BACKBONE_OPTIMIZERS[settings.name].make(_parameter_groups(named, settings, mesh), settings)


def _parameter_groups(
    named: Sequence[tuple[str, nn.Parameter]], settings: OptimizerConfig, mesh: Mesh
) -> list[dict[str, Any]]:
    """Optimizer groups: (matrices, the rest) x (replicated, expert slices), without groups that are empty here.

    DeepSpeed lays a group's parameters one after another into one buffer. Those of odd sizes come last, so that every
    other one begins at a multiple of 16 bytes: matrix products load 16 bytes at a time.
    """
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for name, parameter in sorted(named, key=lambda item: item[1].numel() % _ALIGNED != 0):
        decayed = parameter.ndim >= 2 and (settings.decay_embeddings or not name.startswith(("embedding.", "head.")))
        decayed = decayed and not name.endswith("_norm.weight")  # an engram has norm weights for each branch
        expert = not getattr(parameter, "allreduce", True)
        if (expert, decayed) not in groups:
            mark = {"moe": True, "name": mesh.expert_group_name} if expert else {}
            decay = settings.weight_decay if decayed else 0.0
            groups[expert, decayed] = {"params": [], "weight_decay": decay, **mark}
        groups[expert, decayed]["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]
