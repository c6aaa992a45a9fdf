"""The router: chooses the experts of each token, and their weights."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kernels import kernels_serve, kmem_kernels
from .shape import Shape

# Shape letters: T tokens, H hidden size, E experts, K experts per token, G groups of experts.


class Routing(NamedTuple):
    """The experts of T tokens."""

    experts_TK: Tensor
    """int64, best first; among equal scores, the lower expert wins."""
    weights_TK: Tensor
    """fp32 factors on the experts' outputs."""
    logits_TE: Tensor
    """fp32."""
    scores_TE: Tensor
    """fp32 softmax or sigmoid of the logits, without the selection bias."""
    counts_E: Tensor
    """int64, tokens of each expert; sums to T * K."""


class Router(nn.Module):
    """Scores, choice and weights, in fp32 whatever the dtype of the weights or an autocast.

    Scores are a softmax or sigmoid over all experts. A selection bias affects the choice only (arXiv 2408.15664). With
    groups, only the experts of the best groups can be chosen (DeepSeek-V2 section 2.2.2, V3 section 2.1.2).
    """

    selection_bias: Tensor | None

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.moe = shape.moe
        self.weight = nn.Parameter(torch.empty(self.moe.num_experts, shape.hidden_size))
        bias = torch.zeros(self.moe.num_experts, dtype=torch.float32) if self.moe.selection_bias else None
        self.register_buffer("selection_bias", bias)

    def forward(self, hidden_TH: Tensor) -> Routing:
        moe = self.moe
        wide = torch.promote_types(hidden_TH.dtype, torch.float32)
        device = "cpu" if hidden_TH.is_meta else hidden_TH.device.type  # there is no autocast of meta tensors
        with torch.autocast(device, enabled=False):
            logits_TE = F.linear(hidden_TH.to(wide), self.weight.to(wide))
            if kernels_serve(logits_TE) and logits_TE.dtype == torch.float32:
                return self._routed_by_kernel(logits_TE)
            scores_TE = logits_TE.softmax(-1) if moe.score_function == "softmax" else logits_TE.sigmoid()
            with torch.no_grad():
                preference_TE = scores_TE if self.selection_bias is None else scores_TE + self.selection_bias
                if moe.num_groups > 1:
                    preference_TE = limit_to_best_groups(
                        preference_TE, moe.num_groups, moe.top_groups, moe.group_score_top_k
                    )
                experts_TK = stable_top_k(preference_TE, moe.top_k)
            weights_TK = scores_TE.gather(1, experts_TK)
            if moe.renormalize:
                weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
            if moe.scaling_factor != 1:
                weights_TK = weights_TK * moe.scaling_factor
        return Routing(experts_TK, weights_TK, logits_TE, scores_TE, count_choices(experts_TK, moe.num_experts))

    def _routed_by_kernel(self, logits_TE: Tensor) -> Routing:
        moe = self.moe
        choice = kmem_kernels.route.op.route(
            logits_TE,
            self.selection_bias,
            top_k=moe.top_k,
            score_function=moe.score_function,
            num_groups=moe.num_groups,
            top_groups=moe.top_groups,
            group_score_top_k=moe.group_score_top_k,
            renormalize=moe.renormalize,
            scaling_factor=moe.scaling_factor,
            backend="triton",
        )
        return Routing(choice.experts_TK, choice.weights_TK, logits_TE, choice.scores_TE, choice.counts_E)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "Router":
        # The bias changes in steps of thousandths, which bf16 would round away. So it stays in fp32 whatever the dtype
        # to which the module is moved.
        bias = self.selection_bias
        super()._apply(fn, recurse)
        if bias is not None and self.selection_bias is not None and self.selection_bias.dtype != torch.float32:
            self.selection_bias = bias.to(self.selection_bias.device)
        return self


MOST_MAXIMA = 8
"""Up to this many choices are made by as many passes over the values."""


def stable_top_k(values: Tensor, k: int) -> Tensor:
    """Indices of the k largest values of the last dimension, best first; among equal values, the lower index wins.

    torch.topk leaves the order of equal values open, but a choice that differs between devices or batch shapes would
    make results depend on the mesh. torch.max guarantees the first index. To choose a few of some dozens, it is also
    faster than sorting; to choose more, values and indices are packed into integers, which are all different.
    """
    if k > MOST_MAXIMA and values.dtype != torch.float64:  # which would leave no room for an index
        single = values.float().masked_fill(values == 0, 0.0)  # 0 and -0 are equal, their bits are not
        bits = single.contiguous().view(torch.int32).long()
        ascending = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # the order of the floats
        lower_first = torch.arange(values.shape[-1] - 1, -1, -1, device=values.device)
        return (ascending << 32 | lower_first).topk(k, dim=-1).indices
    best = []
    for _ in range(k):
        best.append(values.max(dim=-1, keepdim=True).indices)
        values = values.scatter(-1, best[-1], float("-inf"))
    return torch.cat(best, dim=-1)


def limit_to_best_groups(values_TE: Tensor, num_groups: int, top_groups: int, group_score_top_k: int) -> Tensor:
    """The values, with -inf for experts outside the token's best groups. The score of a group is the sum of its best
    `group_score_top_k` values."""
    values_TGe = values_TE.unflatten(-1, (num_groups, -1))
    scores_TG = values_TGe.topk(group_score_top_k, dim=-1).values.sum(-1)
    best = stable_top_k(scores_TG, top_groups)
    allowed_TG = torch.zeros_like(scores_TG, dtype=torch.bool).scatter_(1, best, True)
    return values_TGe.masked_fill(~allowed_TG.unsqueeze(-1), float("-inf")).flatten(1)


def count_choices(experts: Tensor, num_experts: int, counted: Tensor | None = None) -> Tensor:
    """Number of occurrences of each expert, int64 [E]. `counted`, a bool tensor that broadcasts to `experts`, is False
    for choices to leave out. Unlike bincount, it does not synchronise with the device."""
    ones = torch.ones_like(experts) if counted is None else counted.expand_as(experts).to(torch.int64)
    return torch.zeros(num_experts, dtype=torch.int64, device=experts.device).scatter_add_(
        0, experts.reshape(-1), ones.reshape(-1)
    )
