"""The dense SwiGLU feed-forward."""

from torch import Tensor, nn

from .matmul import Linear
from .memory_kind import NO_MEMORIES, LayerMemories
from .swiglu import silu_times

# Shape letters: B sequences, T tokens, H hidden size.


class FeedForward(nn.Module):
    """down(silu(gate(x)) * up(x)) (SwiGLU, arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden: Tensor, memories: LayerMemories = NO_MEMORIES) -> Tensor:
        """hidden [.., H] -> [.., H]; with memories, hidden must be [B, T, H]."""
        gate = memories.project("gate_proj", hidden, self.gate_proj(hidden))
        units = silu_times(gate, memories.project("up_proj", hidden, self.up_proj(hidden)))
        return memories.project("down_proj", units, self.down_proj(units))
