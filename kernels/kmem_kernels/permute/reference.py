"""What the kernels compute, in torch; autograd gives the gradients."""

import torch
from torch import Tensor

# Shape letters: T tokens, K experts per token, N >= T * K rows, H hidden size.


def sort_by_expert(experts_TK: Tensor) -> tuple[Tensor, Tensor]:
    """See `op.sort_by_expert`."""
    order_N = experts_TK.flatten().argsort(stable=True)
    place_N = torch.empty_like(order_N)
    place_N[order_N] = torch.arange(len(order_N), device=order_N.device)
    return order_N, place_N.view_as(experts_TK)


def permute(hidden_TH: Tensor, place_TK: Tensor, num_rows: int) -> Tensor:
    """See `op.permute`."""
    copies_TKH = hidden_TH.repeat_interleave(place_TK.shape[1], dim=0)
    return hidden_TH.new_zeros(num_rows, hidden_TH.shape[1]).index_copy(0, place_TK.flatten(), copies_TKH)


def combine(rows_NH: Tensor, weights_TK: Tensor, place_TK: Tensor) -> Tensor:
    """See `op.combine`."""
    wide = torch.promote_types(rows_NH.dtype, torch.float32)
    rows_TKH = rows_NH.index_select(0, place_TK.flatten()).view(*place_TK.shape, -1)
    return (rows_TKH.to(wide) * weights_TK.to(wide).unsqueeze(-1)).sum(1).to(rows_NH.dtype)
