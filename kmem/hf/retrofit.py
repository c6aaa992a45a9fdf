"""A mixture of experts taken over as chains of experts that start by computing exactly what it computes."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from math import prod
from typing import Any

import torch
from pydantic import ValidationError

from kmem.config import ChainOfExperts, ModelConfig, UserError
from kmem.model.parameter_counts import tensor_shapes

_ROUTER = re.compile(r"(layers\.\d+\.feed_forward\.)routers\.\d+\.")
_NORM = re.compile(r"(layers\.\d+\.)feed_forward\.norms\.\d+\.")


def chained(model: ModelConfig, iterations: int, choices: Sequence[str] = ()) -> ModelConfig:
    """The model with `iterations` passes through the experts of each MoE layer, the later ones scaled by zero at first.

    Args:
        choices: further fields of `model.moe.chain`, as `residual=outer`.

    Raises:
        UserError: it has no experts or has chains already, fewer than two iterations are asked for, or the choices do
            not make a chain that starts as the layer.
    """
    if iterations < 2:
        raise UserError(f"--chain-iterations {iterations}: at least 2; the first iteration is the layer as it is")
    if model.moe is None:
        raise UserError("--chain-iterations: the model has no experts")
    if model.moe.chain is not None:
        raise UserError("--chain-iterations: the model's layers are chains of experts already")
    fields: dict[str, Any] = {}
    for choice in choices:
        name, equals, value = choice.partition("=")
        if not equals or name in ("iterations", "retrofit_scale"):
            raise UserError(
                f"--chain-set {choice}: expected a field of model.moe.chain and its value, as residual=outer"
            )
        fields[name] = value
    try:
        chain = ChainOfExperts.model_validate({**fields, "iterations": iterations, "retrofit_scale": True})
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(map(str, problem["loc"]))
        raise UserError(f"--chain-set {field}: {problem['msg']}") from None
    if chain.shared_experts == "once" and not model.moe.num_shared_experts:
        raise UserError("--chain-set shared_experts=once: the model has no shared experts")
    return model.model_copy(update={"moe": model.moe.model_copy(update={"chain": chain})})


class ChainedParts:
    """The parts of a tensor of the chained model: each router and norm is a copy of the layer's one, scales are zero.

    Args:
        parts: tensor name -> its parts, of the model before.
        model: the chained model.
    """

    def __init__(self, parts: Callable[[str], Iterable[torch.Tensor]], model: ModelConfig) -> None:
        self._parts = parts
        self._shapes = tensor_shapes(model.shape)

    def __call__(self, tensor: str) -> Iterator[torch.Tensor]:
        if ".retrofit_scale." in tensor:
            yield torch.zeros(prod(self._shapes[tensor]))
        else:
            yield from self._parts(_NORM.sub(r"\1feed_forward_norm.", _ROUTER.sub(r"\1router.", tensor)))
