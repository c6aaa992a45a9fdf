"""The routed experts of a layer as stacked matrices."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .matmul import grouped_linear, rounded_groups, rounds_groups, times_transposed
from .shape import Shape
from .swiglu import swiglu

# Shape letters: N rows, E experts held here, H hidden size, I width of an expert.

ExpertBackend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(rows [N, H] sorted by expert, gate_up_proj [E, 2I, H] with the gate first, down_proj [E, H, I], counts int64 [E]
with sum N) -> down(silu(gate) * up) of every row, [N, H], differentiable in all arguments but the counts."""


def grouped_mm(rows_NH: Tensor, gate_up_proj: Tensor, down_proj: Tensor, counts_E: Tensor) -> Tensor:
    """The expert backend of exported models, and the default in training. Both products use `F.grouped_mm`, or on a CPU
    with AVX-512 oneDNN, one group at a time."""
    if rounds_groups(rows_NH, gate_up_proj):
        return _GroupedSwiGLU.apply(rows_NH, gate_up_proj, down_proj, counts_E.cumsum(0))
    return grouped_linear(swiglu(grouped_linear(rows_NH, gate_up_proj, counts_E)), down_proj, counts_E)


class Experts(nn.Module):
    """SwiGLU experts, or a contiguous slice of them; `local_experts` are the global numbers of the experts held here.

    Rows arrive sorted by expert; none is dropped or padded. `backend` computes the experts and may be replaced; see
    expert_backends.py.

    Raises:
        ValueError: `hidden_size` or `moe.intermediate_size` is not a multiple of 8.
    """

    def __init__(self, shape: Shape, local_experts: range | None = None) -> None:
        super().__init__()
        moe, hidden_size = shape.moe, shape.hidden_size
        self.local_experts = range(moe.num_experts) if local_experts is None else local_experts
        assert self.local_experts == range(moe.num_experts)[self.local_experts.start : self.local_experts.stop]
        count, width = len(self.local_experts), moe.intermediate_size
        for name, size in (("hidden_size", hidden_size), ("moe.intermediate_size", width)):
            if size % 8:
                raise ValueError(
                    f"{name}={size} must be a multiple of 8: grouped_mm needs rows of a multiple of 16 bytes"
                )
        self.gate_up_proj = nn.Parameter(torch.empty(count, 2 * width, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(count, hidden_size, width))
        self.backend: ExpertBackend = grouped_mm

    def forward(self, rows_NH: Tensor, counts_E: Tensor) -> Tensor:
        """rows [N, H] sorted by expert, counts int64 [local experts] with sum N -> [N, H]."""
        return self.backend(rows_NH, self.gate_up_proj, self.down_proj, counts_E)


class _GroupedSwiGLU(torch.autograd.Function):
    """(rows [N, H] sorted by expert, gate_up_proj [E, 2I, H], down_proj [E, H, I], ends [E]) -> [N, H], on the CPU, one
    group at a time, with oneDNN products (matmul.py).

    Computing one product after the other for the whole batch needs intermediate tensors of the batch's size, and the
    first touch of their memory costs more than the arithmetic on them. The intermediate values of one group stay in the
    processor's caches. The results are the same to the last bit.

    What the backward pass computes from the neighbouring rows in a group's window is set to zero, so that they add
    nothing to the gradients of the weights. (Results of products are not changed: recomputation may have kept them.)
    """

    @staticmethod
    def forward(ctx, rows_NH: Tensor, gate_up_proj: Tensor, down_proj: Tensor, ends_E: Tensor) -> Tensor:
        assert int(ends_E[-1]) == len(rows_NH), f"{int(ends_E[-1])} rows counted, {len(rows_NH)} given"
        out_NH, kept = torch.empty_like(rows_NH), []
        for group in rounded_groups(ends_E, len(rows_NH)):
            gate_up = times_transposed(rows_NH[group.window], gate_up_proj[group.number])
            gate, up = gate_up.chunk(2, dim=-1)
            out = times_transposed(F.silu(gate).mul_(up), down_proj[group.number])
            out_NH[group.start : group.end] = out[group.own]
            kept.append(gate_up)
        ctx.save_for_backward(rows_NH, gate_up_proj, down_proj, ends_E, *kept)
        return out_NH

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NH: Tensor) -> tuple[Tensor | None, ...]:
        rows_NH, gate_up_proj, down_proj, ends_E, *kept = ctx.saved_tensors
        grad_rows = torch.empty_like(rows_NH)
        # A frozen anchor needs neither gradient, which saves two of the five products.
        wanted = any(ctx.needs_input_grad[1:3])
        grad_gate_up, grad_down = (torch.empty_like(w) if wanted else None for w in (gate_up_proj, down_proj))
        idle = set(range(len(ends_E)))
        for group, gate_up in zip(rounded_groups(ends_E, len(rows_NH)), kept, strict=True):
            idle.remove(group.number)
            gate, up = gate_up.chunk(2, dim=-1)
            grad, silu = grad_NH[group.window], F.silu(gate)
            grad_hidden = times_transposed(grad, down_proj[group.number].T)
            for values in (silu, grad_hidden):
                values[: group.own.start] = 0
                values[group.own.stop :] = 0
            if grad_down is not None:
                grad_down[group.number] = times_transposed(grad.T, (silu * up).T)
            inner = torch.empty_like(gate_up)
            grad_gate, grad_up = inner.chunk(2, dim=-1)
            torch.mul(grad_hidden, silu, out=grad_up)
            torch.ops.aten.silu_backward.grad_input(grad_hidden.mul_(up), gate, grad_input=grad_gate)
            if grad_gate_up is not None:
                grad_gate_up[group.number] = times_transposed(inner.T, rows_NH[group.window].T)
            grad_rows[group.start : group.end] = times_transposed(inner, gate_up_proj[group.number].T)[group.own]
        for grad_weights in (grad_gate_up, grad_down):
            if grad_weights is not None:
                grad_weights[list(idle)] = 0
        return grad_rows, grad_gate_up, grad_down, None
