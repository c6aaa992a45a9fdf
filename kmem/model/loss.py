"""Cross entropy over a large vocabulary without holding all logits."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kernels import kernels_serve, kmem_kernels
from .matmul import times_transposed

# Shape letters: N tokens, H hidden size, V vocabulary.

IGNORED = -100
"""Label of a position without a target."""


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Sum over labels != -100 of the cross entropy of the logits hidden @ weight.T.

    hidden [..., H], weight [V, H], labels [...] int64; the result is a scalar in fp32 (fp64 for fp64 inputs). Tokens
    are processed in chunks, and the needed gradients are computed together with the loss, so only one chunk of logits
    exists at a time (the idea of Liger-Kernel's fused linear cross entropy, arXiv 2410.10989, section 3.2).
    """
    return _LinearCrossEntropy.apply(hidden, weight, labels, torch.is_grad_enabled())


def _chunk_rows(weight: Tensor) -> int:
    """Number of tokens per chunk. On a CPU: 16 MiB of logits, which stay in its caches, but enough tokens to outweigh
    the pass over the weight's gradient. On other devices 1 GiB, so that few passes add to that gradient (not tuned on a
    GPU)."""
    elements, least = (2**22, 256) if weight.device.type == "cpu" else (2**30 // weight.element_size(), 1024)
    return max(elements // weight.shape[0], least)


def _losses(logits: Tensor, labels_N: Tensor, wants_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """The sum of the cross entropies of contiguous logits [N, V], and its gradient, which may take the logits'
    memory."""
    if kernels_serve(logits) and logits.dtype != torch.float64:
        losses = kmem_kernels.cross_entropy.op.cross_entropy_(logits, labels_N, backend="triton")
        return losses.sum(), logits
    counted, targets = labels_N[:, None] != IGNORED, labels_N[:, None].clamp_min(0)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    target_logits, largest = wide.gather(1, targets), wide.amax(1, keepdim=True)
    # In place and in one kernel; the largest probability is 1 / sum(exp(logits - largest)).
    probabilities = torch.softmax(wide, 1, out=wide)
    losses = largest - probabilities.amax(1, keepdim=True).log_() - target_logits
    total = losses.where(counted, 0).sum()
    if not wants_gradient:
        return total, None
    return total, probabilities.scatter_add_(1, targets, -torch.ones_like(losses)).to(logits.dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, recorded: bool) -> Tensor:
        wants_hidden, wants_weight = (recorded and needed for needed in ctx.needs_input_grad[:2])
        rows_NH, labels_N = hidden.flatten(0, -2), labels.flatten()
        wide = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        grad_hidden = torch.empty_like(rows_NH) if wants_hidden else None
        grad_weight_HV: Tensor | None = None
        step = _chunk_rows(weight)
        for chunk in (slice(start, start + step) for start in range(0, len(rows_NH), step)):
            rows, counted = rows_NH[chunk], labels_N[chunk, None] != IGNORED
            loss, grads = _losses(times_transposed(rows, weight), labels_N[chunk], wants_hidden or wants_weight)
            total += loss
            # Positions without a target are zeroed in the narrow [N, H] operands, not in the wide gradient [N, V].
            if grad_hidden is not None and grads is not None:
                grad_hidden[chunk] = times_transposed(grads, weight.T).where(counted, 0)
            if wants_weight and grads is not None:
                # Transposed, because both libraries of matmul.py produce it fastest this way.
                product_HV = times_transposed(rows.where(counted, 0).T, grads.T)
                if grad_weight_HV is None:  # of a single chunk, it need not be widened
                    grad_weight_HV = product_HV if len(rows) == len(rows_NH) else product_HV.to(wide)
                else:
                    grad_weight_HV += product_HV
        if wants_weight and grad_weight_HV is None:
            grad_weight_HV = weight.new_zeros(weight.shape[::-1])
        ctx.save_for_backward(grad_hidden, grad_weight_HV, weight)
        ctx.hidden_shape = hidden.shape
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight_HV, weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * grad).to(grad_hidden.dtype).view(ctx.hidden_shape)
        grad_weight = None
        if grad_weight_HV is not None:
            grad_weight = torch.mul(grad_weight_HV.T, grad, out=torch.empty_like(weight))
        return grad_hidden, grad_weight, None, None
