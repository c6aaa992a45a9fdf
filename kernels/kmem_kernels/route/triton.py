"""One program per block of tokens. Its scores stay in registers from the logits to the choice.

Selection works on integers that have the same order as the preferences (`_ordered`). On recent GPUs, their maximum or
minimum over a warp is a single instruction. A second reduction over the columns decides ties. NaN comes first, as in
torch; comparisons of floats would lose it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import interpreted, launching, operator
from .reference import EPSILON

# Shape letters: T tokens, E experts, K experts per token.

WARP_SCORES = 512
"""Scores per warp, 16 per thread. If a token's scores fit one warp, a program is a single warp: reductions over a
token's experts then need no shared memory and no barrier."""

_LOWEST = tl.constexpr(-(2**31))  # below _ordered(-inf): marks padding columns and experts that are already taken
_EPSILON = tl.constexpr(EPSILON)


@triton.jit
def _ordered(values):
    """int32 with the same order as the fp32 values; NaN is above all others."""
    bits = values.to(tl.int32, bitcast=True)
    return tl.where(values != values, 0x7FFFFFFF, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))


@triton.jit
def _value(ordered):
    """The inverse of `_ordered`."""
    return tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).to(tl.float32, bitcast=True)


@triton.jit
def _route(
    logits_ptr,  # fp32 [T, E]
    bias_ptr,  # fp32 [E], read if HAS_BIAS
    experts_ptr,  # int64 [T, K]
    weights_ptr,  # fp32 [T, K]
    scores_ptr,  # fp32 [T, E]
    counts_ptr,  # int64 [E], zeros
    tokens,
    scaling_factor,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPS_BLOCK: tl.constexpr,
    SIZE: tl.constexpr,  # experts per group
    SIZE_BLOCK: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    GROUP_SCORE_TOP_K: tl.constexpr,
    SOFTMAX: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token_live = (token < tokens)[:, None]
    # Each group is padded separately, so that a block can be reshaped into groups; columns ascend with the experts.
    column = tl.arange(0, GROUPS_BLOCK * SIZE_BLOCK)[None, :]
    if GROUPS == 1 or SIZE == SIZE_BLOCK:
        expert = column
        expert_live = column < EXPERTS
    else:
        expert = column // SIZE_BLOCK * SIZE + column % SIZE_BLOCK
        expert_live = (column % SIZE_BLOCK < SIZE) & (column // SIZE_BLOCK < GROUPS)
    place = token[:, None].to(tl.int64) * EXPERTS + expert
    live = token_live & expert_live

    logits = tl.where(expert_live, tl.load(logits_ptr + place, mask=live, other=0.0), float("-inf"))
    if SOFTMAX:
        exponentials = tl.exp(logits - tl.max(logits, 1)[:, None])
        scores = exponentials / tl.sum(exponentials, 1)[:, None]
    else:
        scores = tl.sigmoid(logits)
    tl.store(scores_ptr + place, scores, mask=live)

    preference = scores
    if HAS_BIAS:
        preference += tl.load(bias_ptr + expert, mask=expert_live, other=0.0)
    left = tl.where(expert_live, _ordered(preference), _LOWEST)
    if GROUPS > 1:
        grouped = tl.reshape(left, (BLOCK, GROUPS_BLOCK, SIZE_BLOCK))
        member = tl.arange(0, SIZE_BLOCK)[None, None, :]
        candidates = grouped
        totals = tl.zeros((BLOCK, GROUPS_BLOCK), tl.float32)
        for _ in range(GROUP_SCORE_TOP_K):
            best = tl.max(candidates, 2)
            totals += _value(best)
            first = tl.min(tl.where(candidates == best[:, :, None], member, SIZE_BLOCK), 2)
            candidates = tl.where(member == first[:, :, None], _LOWEST, candidates)
        group = tl.arange(0, GROUPS_BLOCK)[None, :]
        groups_left = tl.where(group < GROUPS, _ordered(totals), _LOWEST)
        allowed = tl.zeros((BLOCK, GROUPS_BLOCK), tl.int32)
        for _ in range(TOP_GROUPS):
            best = tl.max(groups_left, 1)[:, None]
            first = tl.min(tl.where(groups_left == best, group, GROUPS_BLOCK), 1)[:, None]
            allowed = tl.where(group == first, 1, allowed)
            groups_left = tl.where(group == first, _LOWEST, groups_left)
        grouped = tl.where(allowed[:, :, None] > 0, grouped, _LOWEST)
        left = tl.reshape(grouped, (BLOCK, GROUPS_BLOCK * SIZE_BLOCK))

    rank = tl.full((BLOCK, GROUPS_BLOCK * SIZE_BLOCK), TOP_K, tl.int32)
    for k in range(TOP_K):
        best = tl.max(left, 1)[:, None]
        first = tl.min(tl.where(left == best, column, GROUPS_BLOCK * SIZE_BLOCK), 1)[:, None]
        rank = tl.where(column == first, k, rank)
        left = tl.where(column == first, _LOWEST, left)
    taken = token_live & (rank < TOP_K)

    weights = scores
    if RENORMALIZE:
        weights = weights / (tl.sum(tl.where(taken, scores, 0.0), 1)[:, None] + _EPSILON)
    # Every chosen column writes to the place of its rank, so no reduction has to collect the chosen experts.
    out = token[:, None].to(tl.int64) * TOP_K + rank
    tl.store(experts_ptr + out, (expert + tl.zeros_like(rank)).to(tl.int64), mask=taken)
    tl.store(weights_ptr + out, weights * scaling_factor, mask=taken)
    # These are integers, so the order of the additions does not matter.
    counts = tl.sum(taken.to(tl.int32), 0)[None, :]
    tl.atomic_add(counts_ptr + expert, counts.to(tl.int64), mask=counts > 0, sem="relaxed")


@triton.jit
def _route_backward(
    scores_ptr,  # fp32 [T, E]
    experts_ptr,  # int64 [T, K]
    grad_weights_ptr,  # fp32 [T, K]
    grad_scores_ptr,  # fp32 [T, E], read if HAS_GRAD_SCORES
    grad_logits_ptr,  # fp32 [T, E]
    tokens,
    scaling_factor,
    EXPERTS: tl.constexpr,
    EXPERTS_BLOCK: tl.constexpr,
    TOP_K: tl.constexpr,
    SOFTMAX: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    HAS_GRAD_SCORES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[:, None]
    token_live = token < tokens
    expert = tl.arange(0, EXPERTS_BLOCK)[None, :]
    place = token * EXPERTS + expert
    live = token_live & (expert < EXPERTS)
    scores = tl.load(scores_ptr + place, mask=live, other=0.0)
    if HAS_GRAD_SCORES:
        grad = tl.load(grad_scores_ptr + place, mask=live, other=0.0)
    else:
        grad = tl.zeros((BLOCK, EXPERTS_BLOCK), tl.float32)

    # With w_k = f s_k / S and S = sum s: ds_k = f (g_k - sum_j g_j s_j / S) / S. Without renormalising: ds_k = f g_k.
    total = tl.full((BLOCK, 1), _EPSILON, tl.float32)
    product = tl.zeros((BLOCK, 1), tl.float32)
    if RENORMALIZE:
        for k in tl.static_range(TOP_K):
            chosen = tl.load(experts_ptr + token * TOP_K + k, mask=token_live, other=0)
            score = tl.load(scores_ptr + token * EXPERTS + chosen, mask=token_live, other=0.0)
            total += score
            product += score * tl.load(grad_weights_ptr + token * TOP_K + k, mask=token_live, other=0.0)
    for k in tl.static_range(TOP_K):
        chosen = tl.load(experts_ptr + token * TOP_K + k, mask=token_live, other=0)
        grad_chosen = tl.load(grad_weights_ptr + token * TOP_K + k, mask=token_live, other=0.0)
        if RENORMALIZE:
            grad_chosen = (grad_chosen - product / total) / total
        grad += tl.where(expert == chosen.to(tl.int32), grad_chosen * scaling_factor, 0.0)

    if SOFTMAX:
        grad = scores * (grad - tl.sum(scores * grad, 1)[:, None])
    else:
        grad = grad * scores * (1 - scores)
    tl.store(grad_logits_ptr + place, grad, mask=live)


@operator
def route(
    logits_TE: Tensor,
    selection_bias_E: Tensor | None,
    top_k: int,
    score_function: str,
    num_groups: int,
    top_groups: int,
    group_score_top_k: int,
    renormalize: bool,
    scaling_factor: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.route` for fp32, outside autograd. Scores may differ from torch's in the last bits; the choice is the
    stable top-k of the scores that are returned."""
    logits_TE = logits_TE.contiguous()
    tokens, experts = logits_TE.shape
    chosen_TK = torch.empty(tokens, top_k, dtype=torch.int64, device=logits_TE.device)
    weights_TK = logits_TE.new_empty(tokens, top_k)
    scores_TE = torch.empty_like(logits_TE)
    counts_E = torch.zeros(experts, dtype=torch.int64, device=logits_TE.device)
    if launching(scores_TE):
        size = experts // num_groups
        groups_block, size_block = triton.next_power_of_2(num_groups), triton.next_power_of_2(size)
        tiling = _tiling(groups_block * size_block)
        _route[(triton.cdiv(tokens, tiling["BLOCK"]),)](
            logits_TE,
            logits_TE if selection_bias_E is None else selection_bias_E.contiguous(),
            chosen_TK,
            weights_TK,
            scores_TE,
            counts_E,
            tokens,
            float(scaling_factor),
            EXPERTS=experts,
            TOP_K=top_k,
            GROUPS=num_groups,
            GROUPS_BLOCK=groups_block,
            SIZE=size,
            SIZE_BLOCK=size_block,
            TOP_GROUPS=top_groups,
            GROUP_SCORE_TOP_K=group_score_top_k,
            SOFTMAX=score_function == "softmax",
            HAS_BIAS=selection_bias_E is not None,
            RENORMALIZE=renormalize,
            # If a score were fused into the addition of its bias, it would differ from the returned score.
            enable_fp_fusion=False,
            **tiling,
        )
    return chosen_TK, weights_TK, scores_TE, counts_E


@operator
def route_backward(
    scores_TE: Tensor,
    experts_TK: Tensor,
    grad_weights_TK: Tensor,
    grad_scores_TE: Tensor | None,
    score_function: str,
    renormalize: bool,
    scaling_factor: float,
) -> Tensor:
    """The gradient of the logits, fp32 [T, E]."""
    tokens, experts = scores_TE.shape
    grad_logits_TE = torch.empty_like(scores_TE)
    if launching(scores_TE):
        experts_block = triton.next_power_of_2(experts)
        tiling = _tiling(experts_block)
        _route_backward[(triton.cdiv(tokens, tiling["BLOCK"]),)](
            scores_TE,
            experts_TK,
            grad_weights_TK.contiguous(),
            scores_TE if grad_scores_TE is None else grad_scores_TE.contiguous(),
            grad_logits_TE,
            tokens,
            float(scaling_factor),
            EXPERTS=experts,
            EXPERTS_BLOCK=experts_block,
            TOP_K=experts_TK.shape[1],
            SOFTMAX=score_function == "softmax",
            RENORMALIZE=renormalize,
            HAS_GRAD_SCORES=grad_scores_TE is not None,
            **tiling,
        )
    return grad_logits_TE


def _tiling(columns: int) -> dict[str, int]:
    block = 64 if interpreted() else max(1, WARP_SCORES // columns)
    return {"BLOCK": block, "num_warps": min(max(1, columns // WARP_SCORES), 8)}
