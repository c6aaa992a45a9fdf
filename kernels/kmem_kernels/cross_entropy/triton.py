"""One program per token, which walks its logits twice: for the largest and the sum, and to write the gradient."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import interpreted, launching, operator
from .reference import IGNORED

# Shape letters: N tokens, V vocabulary.

BLOCK = 4096
WARPS = 8


@triton.jit
def _cross_entropy(
    logits_ptr,  # [N, V], contiguous; becomes the gradient
    labels_ptr,  # int64 [N]
    losses_ptr,  # fp32 [N]
    VOCABULARY: tl.constexpr,
    NO_LABEL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + token)
    logits_ptr += token * VOCABULARY
    within = tl.arange(0, BLOCK)
    # Each lane keeps the largest logit that it has seen and a sum relative to it.
    most = tl.full((BLOCK,), -float("inf"), tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, VOCABULARY, BLOCK):
        live = start + within < VOCABULARY
        logits = tl.load(logits_ptr + start + within, mask=live, other=-float("inf")).to(tl.float32)
        larger = tl.maximum(most, logits)
        base = tl.where(larger == -float("inf"), 0.0, larger)
        sums = sums * tl.exp(most - base) + tl.exp(logits - base)
        most = larger
    largest = tl.max(most, 0)
    total = tl.sum(sums * tl.exp(most - largest), 0)
    counted = label != NO_LABEL
    target = tl.load(logits_ptr + tl.where(counted, label, 0)).to(tl.float32)
    tl.store(losses_ptr + token, tl.where(counted, tl.log(total) + (largest - target), 0.0))
    tl.debug_barrier()  # the target's logit is read before its place is written
    for start in range(0, VOCABULARY, BLOCK):
        place = start + within
        live = place < VOCABULARY
        logits = tl.load(logits_ptr + place, mask=live, other=-float("inf")).to(tl.float32)
        gradient = tl.exp(logits - largest) / total - tl.where(place == label, 1.0, 0.0)
        gradient = tl.where(counted, gradient, 0.0)
        tl.store(logits_ptr + place, gradient.to(logits_ptr.dtype.element_ty), mask=live)


@operator(mutates=("logits_NV",))
def cross_entropy_(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """`reference.cross_entropy_`."""
    tokens, vocabulary = logits_NV.shape
    losses_N = torch.empty(tokens, dtype=torch.float32, device=logits_NV.device)
    if launching(losses_N):
        _cross_entropy[(tokens,)](
            logits_NV,
            labels_N.contiguous(),
            losses_N,
            VOCABULARY=vocabulary,
            NO_LABEL=IGNORED,
            BLOCK=min(triton.next_power_of_2(vocabulary), 1 << 16 if interpreted() else BLOCK),
            num_warps=WARPS,
        )
    return losses_N
