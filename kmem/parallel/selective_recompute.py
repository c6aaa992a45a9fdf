"""Selective recomputation (`train.recompute: selective`): the backward pass computes again what is cheap to compute.

The choice is by operator, so that it holds for every layer and every memory.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

_KEPT = (
    "aten::mm",
    "aten::addmm",
    "aten::_grouped_mm",
    "mkldnn::_linear_pointwise",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_fused_attention_overrideable",
    "kmem_meta::attention",  # and the next: where only shapes are computed (`meta_operators.py`)
    "kmem_meta::grouped_mm",
    "_c10d_functional::all_to_all_single",
    "_c10d_functional::wait_tensor",
)
"""Operators whose results are kept. Products of batches (aten::bmm) are not among them: they mix branches, and in
attention that is not fused, their results grow with the square of the length. The products of the expert backends
deepspeed and liger are no operators of PyTorch, so they are computed again."""


def checkpoint_selectively(function: Callable[..., Any], *inputs: Any) -> Any:
    """`function(*inputs)`, of which the backward pass keeps the inputs and the results of `_KEPT`.

    The recomputation must call the kept operators in the same order: they give the results of the first pass then.
    """
    contexts = partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def _policy(_: Any, operator: Any, *arguments: Any, **keywords: Any) -> CheckpointPolicy:
    if operator.name().partition(".")[0] in _KEPT or _brings_to_host(operator, arguments, keywords):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _brings_to_host(operator: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> bool:
    """A copy from a device waits for it; the first pass did."""
    if operator is not torch.ops.aten._to_copy.default or keywords.get("device") is None:
        return False
    source = arguments[0]
    return isinstance(source, Tensor) and source.device.type != "cpu" and keywords["device"].type == "cpu"
