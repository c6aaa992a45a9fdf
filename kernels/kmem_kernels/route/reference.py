"""The definition of the kernels, in torch; autograd gives the gradients."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

# Shape letters: T tokens, E experts, K experts per token, G groups of experts.

EPSILON = 1e-20
"""Added to the sum of a token's weights before the weights are divided by it."""


class Choice(NamedTuple):
    """The experts of T tokens."""

    experts_TK: Tensor
    """int64, best first; among equal scores, the lower expert wins."""
    weights_TK: Tensor
    scores_TE: Tensor
    """Softmax or sigmoid of the logits, without the selection bias."""
    counts_E: Tensor
    """int64, tokens of each expert; sums to T * K."""


def route(
    logits_TE: Tensor,
    selection_bias_E: Tensor | None,
    top_k: int,
    score_function: Literal["softmax", "sigmoid"],
    num_groups: int,
    top_groups: int,
    group_score_top_k: int,
    renormalize: bool,
    scaling_factor: float,
) -> Choice:
    """See `op.route`."""
    scores_TE = logits_TE.softmax(-1) if score_function == "softmax" else logits_TE.sigmoid()
    with torch.no_grad():
        preference_TE = scores_TE if selection_bias_E is None else scores_TE + selection_bias_E
        if num_groups > 1:
            preference_TGe = preference_TE.unflatten(-1, (num_groups, -1))
            group_scores_TG = preference_TGe.topk(group_score_top_k, dim=-1).values.sum(-1)
            allowed_TG = torch.zeros_like(group_scores_TG, dtype=torch.bool)
            best_TG = group_scores_TG.sort(dim=-1, descending=True, stable=True).indices
            allowed_TG.scatter_(1, best_TG[:, :top_groups], True)
            preference_TE = preference_TGe.masked_fill(~allowed_TG.unsqueeze(-1), float("-inf")).flatten(1)
        experts_TK = preference_TE.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights_TK = scores_TE.gather(1, experts_TK)
    if renormalize:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + EPSILON)
    counts_E = torch.bincount(experts_TK.flatten(), minlength=logits_TE.shape[1])
    return Choice(experts_TK, weights_TK * scaling_factor, scores_TE, counts_E)
