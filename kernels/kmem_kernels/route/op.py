"""The scores, choice, weights and counts of a router, in one pass over its logits, with gradients."""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backend import Backend, chosen
from . import reference
from .reference import Choice

# Shape letters: T tokens, E experts, K experts per token.


def route(
    logits_TE: Tensor,
    selection_bias_E: Tensor | None,
    *,
    top_k: int,
    score_function: Literal["softmax", "sigmoid"] = "softmax",
    num_groups: int = 1,
    top_groups: int = 1,
    group_score_top_k: int = 2,
    renormalize: bool = True,
    scaling_factor: float = 1.0,
    backend: Backend | None = None,
) -> Choice:
    """The K best experts of each token by score + selection bias, and the weights of their outputs.

    `weights_TK` and `scores_TE` carry gradients back to the logits; the selection bias gets no gradient.

    Args:
        logits_TE: fp32 (the torch backend takes any float dtype).
        selection_bias_E: fp32, added for the choice only; None: no bias.
        num_groups, top_groups, group_score_top_k: with groups, only experts of the `top_groups` best groups can be
            chosen; the score of a group is the sum of its best `group_score_top_k` experts.
        renormalize: divide a token's weights by their sum.
        scaling_factor: factor on the weights, after renormalising.
        backend: default `triton` for CUDA tensors, else `torch`.

    Raises:
        ValueError: the sizes do not fit together, or `score_function` is unknown.
        TypeError: the Triton backend was given a dtype other than fp32.
    """
    experts = logits_TE.shape[1]
    if experts % num_groups or not top_k <= experts // num_groups * top_groups <= experts:
        raise ValueError(
            f"{top_k} of {experts} experts cannot be chosen from {top_groups} of {num_groups} groups of equal size"
        )
    if num_groups > 1 and group_score_top_k > experts // num_groups:
        raise ValueError(f"a group of {experts // num_groups} experts has no best {group_score_top_k}")
    if score_function not in ("softmax", "sigmoid"):
        raise ValueError(f"score_function {score_function!r} is not one of 'softmax', 'sigmoid'")
    selection = (top_k, score_function, num_groups, top_groups, group_score_top_k, renormalize, scaling_factor)
    if chosen(backend, logits_TE) == "torch":
        return reference.route(logits_TE, selection_bias_E, *selection)
    for tensor in (logits_TE, selection_bias_E):
        if tensor is not None and tensor.dtype != torch.float32:
            raise TypeError(f"the Triton backend routes in fp32, but was given {tensor.dtype}")
    return Choice(*_Route.apply(logits_TE, selection_bias_E, selection))


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TE: Tensor, selection_bias_E: Tensor | None, selection: tuple[Any, ...]) -> Choice:
        from .triton import route as kernel

        choice = Choice(*kernel(logits_TE, selection_bias_E, *selection))
        ctx.selection = selection
        ctx.mark_non_differentiable(choice.experts_TK, choice.counts_E)
        ctx.set_materialize_grads(False)  # without balance losses, the scores get no gradient
        ctx.save_for_backward(choice.scores_TE, choice.experts_TK)
        return choice

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, _experts: None, grad_weights_TK: Tensor | None, grad_scores_TE: Tensor | None, _counts: None
    ):
        from .triton import route_backward as kernel

        if grad_weights_TK is None and grad_scores_TE is None:
            return None, None, None
        scores_TE, experts_TK = ctx.saved_tensors
        if grad_weights_TK is None:
            grad_weights_TK = scores_TE.new_zeros(experts_TK.shape)
        _, score_function, _, _, _, renormalize, scaling_factor = ctx.selection
        return (
            kernel(
                scores_TE,
                experts_TK,
                grad_weights_TK,
                grad_scores_TE,
                score_function,
                renormalize,
                scaling_factor,
            ),
            None,
            None,
        )
