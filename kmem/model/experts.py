"""The routed experts of a layer as stacked matrices."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .grouped_swiglu import GroupedSwiGLU
from .matmul import grouped_linear, rounds_groups
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
        return GroupedSwiGLU.apply(rows_NH, gate_up_proj, down_proj, counts_E.cumsum(0))
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
