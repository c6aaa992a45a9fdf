"""The definition of the kernels, in torch; autograd gives the gradients."""

import torch
from torch import Tensor

# Shape letters: T tokens, K experts per token, N >= T * K rows, H hidden size.


def sort_by_expert(experts_TK: Tensor) -> tuple[Tensor, Tensor]:
    """See `op.sort_by_expert`."""
    choice_of_row_N = experts_TK.flatten().argsort(stable=True)
    row_of_choice_N = torch.empty_like(choice_of_row_N)
    row_of_choice_N[choice_of_row_N] = torch.arange(len(choice_of_row_N), device=choice_of_row_N.device)
    return choice_of_row_N, row_of_choice_N.view_as(experts_TK)


def permute(hidden_TH: Tensor, row_of_choice_TK: Tensor, num_rows: int) -> Tensor:
    """See `op.permute`."""
    copies_TKH = hidden_TH.repeat_interleave(row_of_choice_TK.shape[1], dim=0)
    return hidden_TH.new_zeros(num_rows, hidden_TH.shape[1]).index_copy(0, row_of_choice_TK.flatten(), copies_TKH)


def combine(rows_NH: Tensor, weights_TK: Tensor, row_of_choice_TK: Tensor) -> Tensor:
    """See `op.combine`."""
    wide = torch.promote_types(rows_NH.dtype, torch.float32)
    rows_TKH = rows_NH.index_select(0, row_of_choice_TK.flatten()).view(*row_of_choice_TK.shape, -1)
    return (rows_TKH.to(wide) * weights_TK.to(wide).unsqueeze(-1)).sum(1).to(rows_NH.dtype)
