"""The dense SwiGLU feed-forward."""

from torch import Tensor, nn

from .bank_blocks import BankInput
from .matmul import Linear
from .swiglu import silu_times


class FeedForward(nn.Module):
    """down(silu(gate(x)) * up(x)) (SwiGLU, arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden: Tensor, bank: BankInput | None = None) -> Tensor:
        """hidden [.., H] -> [.., H]; with a memory bank [B, T, H]."""
        if bank is None:
            return self.down_proj(silu_times(self.gate_proj(hidden), self.up_proj(hidden)))
        gate = bank.adapt("gate_proj", hidden, self.gate_proj(hidden))
        units = silu_times(gate, bank.adapt("up_proj", hidden, self.up_proj(hidden)))
        return bank.adapt("down_proj", units, self.down_proj(units))
