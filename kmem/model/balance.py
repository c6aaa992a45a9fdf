"""Keeping the experts evenly loaded: auxiliary losses, loss-free bias, and routing statistics."""

from dataclasses import dataclass

import torch
from torch import Tensor

# Shape letters: B sequences, T tokens (of the micro-batch), E experts, K experts per token.


@dataclass(frozen=True)
class RoutingStatistics:
    """One layer's routing of one micro-batch, detached. Losses are fp32 scalars before their coefficients; a loss whose
    coefficient is zero is not computed and reads zero."""

    counts_E: Tensor
    """int64, tokens of each expert."""
    excluded: Tensor
    """int64 scalar: choices made by padding positions; nothing else here counts them."""
    aux_loss: Tensor
    sequence_aux_loss: Tensor
    z_loss: Tensor
    entropy: Tensor
    """Mean over tokens of the entropy of the normalised scores, in nats; log(E) for a router that does not choose."""


def normalised_scores(scores_TE: Tensor, score_function: str) -> Tensor:
    """Scores scaled to sum to one over the experts (DeepSeek-V3, eq. 19)."""
    return scores_TE if score_function == "softmax" else scores_TE / (scores_TE.sum(-1, keepdim=True) + 1e-20)


def load_balancing_loss(scores_BTE: Tensor, experts_BTK: Tensor, real_BT: Tensor | None = None) -> Tensor:
    """E * sum_i f_i * P_i for each of B groups of tokens, [B]; it is 1 at perfect balance.

    f_i is the share of choices that fall on expert i, P_i the mean of its normalised score. With the whole micro-batch
    as one group this is the loss of the Switch Transformer (arXiv 2101.03961, eq. 4); with one group per sequence it is
    the loss of DeepSeek-V3 (arXiv 2412.19437, eqs. 17-20). real_BT: bool, False where a position holds no token and
    does not count; None: every position counts.
    """
    ones_BTK = torch.ones_like(experts_BTK, dtype=scores_BTE.dtype)
    tokens_B1: int | Tensor = scores_BTE.shape[1]
    if real_BT is not None:
        ones_BTK, scores_BTE = ones_BTK * real_BT[..., None], scores_BTE * real_BT[..., None]
        tokens_B1 = real_BT.sum(1, keepdim=True).clamp_min(1)
    counts_BE = torch.zeros_like(scores_BTE[:, 0]).scatter_add_(1, experts_BTK.flatten(1), ones_BTK.flatten(1))
    share_BE = counts_BE / (tokens_B1 * experts_BTK.shape[2])
    means_BE = scores_BTE.mean(1) if real_BT is None else scores_BTE.sum(1) / tokens_B1
    return scores_BTE.shape[-1] * (share_BE * means_BE).sum(-1)


def z_loss(logits_TE: Tensor, real_T: Tensor | None = None) -> Tensor:
    """Mean over tokens of the squared logsumexp of the router's logits (ST-MoE, arXiv 2202.08906, eq. 5)."""
    return mean_of_tokens(logits_TE.logsumexp(-1).square(), real_T)


def mean_of_tokens(values_T: Tensor, real_T: Tensor | None) -> Tensor:
    """Mean over the positions that hold a token; with None, over all positions."""
    return values_T.mean() if real_T is None else (values_T * real_T).sum() / real_T.sum().clamp_min(1)


def updated_selection_bias(bias_E: Tensor, counts_E: Tensor, rate: float) -> Tensor:
    """The bias after one step of loss-free balancing (arXiv 2408.15664, algorithm 1): experts with fewer tokens than
    the mean go up by `rate`, experts with more go down by it."""
    counts_E = counts_E.to(bias_E.dtype)
    return bias_E + rate * (counts_E.mean() - counts_E).sign()
