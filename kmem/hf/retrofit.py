"""Retrofit a mixture of experts: turn its layers into chains of experts that at first compute exactly the same."""

import re
from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import Any

import torch
from pydantic import ValidationError

from kmem.config import ChainOfExperts, ModelConfig, UserError
from kmem.config.problems import explain
from kmem.model.parameter_counts import tensor_shapes

_ROUTER = re.compile(r"(layers\.\d+\.feed_forward\.)routers\.\d+\.")
_NORM = re.compile(r"(layers\.\d+\.)feed_forward\.norms\.\d+\.")


def chained(model: ModelConfig, iterations: int, choices: Sequence[str] = ()) -> ModelConfig:
    """The model with `iterations` passes through the experts of each MoE layer; at first the later passes are scaled by
    zero.

    Args:
        choices: further fields of `model.moe.chain`, such as `residual=outer`.

    Raises:
        UserError: the model has no experts or already has chains, `iterations` is less than 2, or the choices do not
            give a chain that at first computes the same as the layer.
    """
    if iterations < 2:
        raise UserError(f"--chain-iterations {iterations}: at least 2; the first iteration is the layer as it is")
    if model.moe is None:
        raise UserError("--chain-iterations: the model has no experts")
    if model.moe.chain is not None:
        raise UserError("--chain-iterations: the model's layers already are chains of experts")
    fields: dict[str, Any] = {}
    for choice in choices:
        name, equals, value = choice.partition("=")
        if not equals or name in ("iterations", "retrofit_scale"):
            raise UserError(
                f"--chain-set {choice}: expected a field of model.moe.chain and its value, such as residual=outer"
            )
        fields[name] = value
    try:
        chain = ChainOfExperts.model_validate({**fields, "iterations": iterations, "retrofit_scale": True})
    except ValidationError as error:
        raise UserError(f"--chain-set {explain(error.errors(), ChainOfExperts)[0]}") from None
    if chain.shared_experts == "once" and not model.moe.num_shared_experts:
        raise UserError("--chain-set shared_experts=once: the model has no shared experts")
    return model.model_copy(update={"moe": model.moe.model_copy(update={"chain": chain})})


def chained_parts(
    parts: Callable[[str], Iterable[torch.Tensor]], model: ModelConfig
) -> Callable[[str], Iterable[torch.Tensor]]:
    """The parts of a tensor of the chained model: each router and norm is a copy of the layer's, scales are zero.

    Args:
        parts: tensor name -> its parts in the original model.
        model: the chained model.
    """
    shapes = tensor_shapes(model.shape)

    def parts_of(tensor: str) -> Iterable[torch.Tensor]:
        if ".retrofit_scale." in tensor:
            return [torch.zeros(prod(shapes[tensor]))]
        return parts(_NORM.sub(r"\1feed_forward_norm.", _ROUTER.sub(r"\1router.", tensor)))

    return parts_of
