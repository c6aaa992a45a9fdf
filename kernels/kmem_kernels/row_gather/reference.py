"""The definition of the kernel, in torch."""

from torch import Tensor

# Shape letters: R rows of D values in the table, U of them gathered into an output of N rows.


def row_gather(table_RD: Tensor, rows_U: Tensor, out_ND: Tensor, places_U: Tensor | None) -> Tensor:
    """See `op.row_gather`."""
    values_UD = table_RD.index_select(0, rows_U.to(table_RD.device)).to(out_ND.device, out_ND.dtype)
    if places_U is None:
        return out_ND.copy_(values_UD)
    return out_ND.index_copy_(0, places_U, values_UD)
