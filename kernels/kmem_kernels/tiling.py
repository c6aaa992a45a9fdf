"""Sizes of programs over the branches of the residual stream, [N, M, D]: N tokens, M branches, D hidden size."""

from torch import Tensor

from .backend import interpreted


def row_tiling(streams: Tensor, most: int = 8) -> dict[str, int]:
    """For kernels with one token of streams [N, M, D] per program. Each thread holds the same values of every branch,
    at most 16 bytes or `most` values, so that sums over branches stay within a thread."""
    _, branches, hidden = streams.shape
    per_warp = 32 * min(16 // streams.element_size(), most)
    warps = 1 if interpreted() or hidden <= per_warp else 2
    return {
        "M": branches,
        "HIDDEN": hidden,
        "Q": _power(branches),
        "BLOCK_HIDDEN": _power(hidden) if interpreted() else per_warp * warps,
        "num_warps": warps,
    }


def block_tiling(streams: Tensor, most: int = 4) -> tuple[tuple[int, int], int, dict[str, int]]:
    """For kernels that walk a block of tokens of streams [N, M, D] for some columns of all branches, and sum over the
    tokens: the grid (column blocks, token blocks), the tokens of a block, and the tiling."""
    tiling = row_tiling(streams, most)
    block = 64
    return (-(-streams.shape[2] // tiling["BLOCK_HIDDEN"]), max(1, -(-len(streams) // block))), block, tiling


def _power(number: int) -> int:
    """The smallest power of two that is at least as large."""
    return 1 << (number - 1).bit_length()
