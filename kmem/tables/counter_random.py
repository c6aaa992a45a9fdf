"""Counter-based random streams (`kmem_kernels.counter_random`), compiled for the host."""

import hashlib

import numba
import numpy as np
from kmem_kernels import counter_random as definition

_SIXTEEN, _LOW = np.uint64(16), np.uint64(0xFFFF)
_THREE = np.uint64(3)
_CENTRE = 12 * 65535 // 2

random_bits = numba.njit(inline="always")(definition.random_bits)
"""64 random bits of a stream at a counter (uint64)."""


def key(seed: int, *names: str) -> np.uint64:
    """The 64-bit key of a stream: a digest of the run's seed and of names that distinguish streams."""
    text = "\0".join([str(seed), *names]).encode()
    return np.uint64(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little"))


@numba.njit(nogil=True, cache=True)
def fill_normal(out, first_row, key, scale):
    """Fill out [n, D] fp32 with rows `first_row`, `first_row` + 1, .. of an infinite table of nearly normal values.

    A value is the sum of twelve uniform 16-bit integers (mean 0 and variance 1 after centring and scaling by 2^-16,
    excess kurtosis -0.1, no value beyond six standard deviations), times the standard deviation. `scale` is the
    standard deviation times 2^-16, fp32, so each value is rounded once.
    """
    rows, dim = out.shape
    for i in range(rows):
        base = np.uint64(first_row + i) * np.uint64(dim)
        for j in range(dim):
            total = np.uint64(0)
            for draw in range(3):
                bits = random_bits(key, (base + np.uint64(j)) * _THREE + np.uint64(draw))
                total += (bits & _LOW) + ((bits >> _SIXTEEN) & _LOW)
                total += ((bits >> np.uint64(32)) & _LOW) + (bits >> np.uint64(48))
            out[i, j] = np.float32(np.int32(total) - np.int32(_CENTRE)) * scale


def normal_rows(first_row: int, stop_row: int, dim: int, stream: np.uint64, std: float) -> np.ndarray:
    """Initial values of rows [first_row, stop_row) of a table, [stop_row - first_row, dim] fp32."""
    out = np.empty((stop_row - first_row, dim), np.float32)
    fill_normal(out, first_row, stream, np.float32(std / 65536))
    return out
