"""SwiGLU experts on the CPU, one group at a time, with oneDNN products (matmul.py).

Computing one product after the other for the whole batch needs intermediate tensors of the batch's size, and the first
touch of their memory costs more than the arithmetic on them. The intermediate values of one group stay in the
processor's caches. The results are the same to the last bit.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .matmul import rounded_groups, times_transposed

# Shape letters: N rows, E experts, H hidden size, I width of an expert.


class GroupedSwiGLU(torch.autograd.Function):
    """(rows [N, H] sorted by expert, gate_up_proj [E, 2I, H], down_proj [E, H, I], ends [E]) -> [N, H].

    Gate and up of the neighbouring rows in a group's window are set to zero. Everything computed from them is then
    zero, and they add nothing to the gradients of the weights.
    """

    @staticmethod
    def forward(ctx, rows_NH: Tensor, gate_up_proj: Tensor, down_proj: Tensor, ends_E: Tensor) -> Tensor:
        assert int(ends_E[-1]) == len(rows_NH), f"{int(ends_E[-1])} rows counted, {len(rows_NH)} given"
        out_NH, kept = torch.empty_like(rows_NH), []
        for group in rounded_groups(ends_E, len(rows_NH)):
            gate_up = times_transposed(rows_NH[group.window], gate_up_proj[group.number])
            gate_up[: group.own.start] = 0
            gate_up[group.own.stop :] = 0
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
            if grad_down is not None:
                grad_down[group.number] = times_transposed(grad.T, (silu * up).T)
            grad_hidden = times_transposed(grad, down_proj[group.number].T)
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
